# SPDX-License-Identifier: Apache-2.0
"""What a run of CATModifier leaves on the model, for the card of its checkpoint."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

__all__ = ["RunRecord", "command_of", "dataset_ids", "note_command"]

_ATTRIBUTE = "_cat_run_record"
_COMMAND = "_cat_command"
_SOURCE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")


@dataclass
class RunRecord:
    """
    What was observed while a model was transformed.

    :param size_before: bytes of the model's parameters
    :param dtype: their dtype
    :param samples: calibration samples; None if the data does not say
    :param tokens: most calibration tokens that one input saw
    :param datasets: ids of the datasets on the Hub
    :param command: command line of the run; None if it was started in Python
    :param predictions: predicted SQNR in dB, before and after, of each transformed input, by
        its kind: the names of its Linears without those of the modules around them
    """

    size_before: int
    dtype: str
    samples: int | None = None
    tokens: int = 0
    datasets: list[str] = field(default_factory=list)
    command: str | None = None
    predictions: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, linears: Iterable[str], tokens: int, before: float, after: float):
        """
        Add the prediction of one input.

        :param linears: full names of the Linears that read it
        :param tokens: calibration tokens that it saw
        :param before: predicted SQNR in dB without the transform
        :param after: predicted SQNR in dB with it
        """
        self.tokens = max(self.tokens, tokens)
        self.predictions.setdefault(_kind(linears), []).append((before, after))

    def mean_predictions(self) -> list[tuple[str, int, float, float]]:
        """
        :return: each kind, its number of inputs, and the means of its predictions before and
            after
        """
        return [
            (kind, len(pairs), *map(fmean, zip(*pairs, strict=True)))  # type: ignore[misc]
            for kind, pairs in self.predictions.items()
        ]

    def attach(self, model: Any):
        """Keep the record on a model until it is saved"""
        setattr(model, _ATTRIBUTE, self)

    @staticmethod
    def of(model: Any) -> "RunRecord | None":
        """Find the record of a model; None if no run in this process has transformed it"""
        return getattr(model, _ATTRIBUTE, None)


def note_command(model: Any, command: str):
    """Keep a command line on a model, for the record of the run that it starts"""
    setattr(model, _COMMAND, command)


def command_of(model: Any) -> str | None:
    """Find the command line that was noted on a model"""
    return getattr(model, _COMMAND, None)


def dataset_ids(dataset: Any) -> list[str]:
    """
    Find the ids on the Hub of the data that a `datasets.Dataset` was made from.

    :param dataset: any dataset; one of another library has no ids
    """
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None)
    found = [_SOURCE.match(str(one)) for one in sources] if isinstance(sources, Mapping) else []
    return sorted({match[1] for match in found if match})


def _kind(linears: Iterable[str]) -> str:
    names = list(linears)
    kind = "/".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"experts: {kind}" if any(".experts." in name for name in names) else kind
