# SPDX-License-Identifier: Apache-2.0
"""The analysis of a model: from data to a table of numbers."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch.nn import Module
from tqdm import tqdm

from cat_modifier.analysis.measure import measure_input
from cat_modifier.analysis.model import Batch, call, find_linears
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.transforms import TRANSFORMS, WHOLE, AnalysisStatistics
from cat_modifier.calibration.collector import InputCollector
from cat_modifier.calibration.shared_inputs import DEFAULT_IGNORE, SharedInput
from cat_modifier.functional.layout import Rotation, choose_layout

__all__ = ["DEFAULT_SCHEMES", "DEFAULT_TRANSFORMS", "UnseenLinearsError", "analyze"]

DEFAULT_SCHEMES = ("W4A4", "W4A8", "W8A8", "W6A6")
DEFAULT_TRANSFORMS = tuple(name for name in TRANSFORMS if name != WHOLE)

_SAMPLE_SIZE = 128
"""Tokens of each input on which SQNR is measured"""


class UnseenLinearsError(ValueError):
    """Some Linears saw no tokens; `results` are those of the others, None if there are none"""

    def __init__(self, names: list[str], results: Any):
        self.results = results
        super().__init__(
            f"{len(names)} Linears saw no tokens, and are not in the results: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Use more data, or add "
            "them to `ignore`"
        )


@torch.no_grad()
def analyze(
    model: Module,
    batches: Sequence[Batch],
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    transforms: Sequence[str] = DEFAULT_TRANSFORMS,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = DEFAULT_IGNORE,
    transform_block_size: int = 128,
) -> pd.DataFrame:
    """
    Predict and measure the quantization error of every Linear, under each transform and
    scheme, in one pass over the data.

    :param model: any module
    :param batches: arguments of the model: token ids, or keyword arguments
    :param schemes: names, see :meth:`Scheme.parse`
    :param transforms: names in ``TRANSFORMS``
    :param targets: Linears by name, class or `re:` pattern
    :param ignore: exceptions from `targets`
    :param transform_block_size: k of CAT, as in CATModifier
    :return: one row per Linear, transform and scheme; columns as in
        :func:`cat_modifier.analysis.measure.measure_input`
    :raises ValueError: if a name is unknown, there are no Linears or no data, experts are
        not Linears, or activations are not finite
    :raises UnseenLinearsError: if some Linears saw no tokens; holds the other results
    """
    parsed = parse_names(schemes, transforms)
    if not parsed or not transforms or not len(batches):
        raise ValueError("The analysis needs a scheme, a transform and a batch at least")
    if transform_block_size < 1:
        raise ValueError(f"`transform_block_size` must be positive, got {transform_block_size}")
    linears = find_linears(model, list(targets), list(ignore))

    def block_size(shared: SharedInput) -> int:
        sizes = shared.in_features, 1, transform_block_size
        return choose_layout(shared.first, *sizes, Rotation.NONE).block_size

    def new_statistics(shared: SharedInput) -> AnalysisStatistics:
        for scheme in parsed:
            scheme.check(shared.first, shared.in_features)
        known = shared.in_features if WHOLE in transforms else block_size(shared)
        return AnalysisStatistics(shared.in_features, known, _SAMPLE_SIZE)

    collector = InputCollector(linears, new_statistics)

    def observe(name: str, index: int, module: Module, args: tuple, output: Any):
        collector.observe(name, args[0], index)

    for index, batch in enumerate(tqdm(batches, desc="Calibrating")):
        if not torch.is_tensor(batch):
            collector.set_attention_mask(index, batch.get("attention_mask"))
        hooks = {linear: partial(observe, name, index) for name, linear in linears.items()}
        call(model, batch, hooks)
    rows = []
    for shared in tqdm(collector.pending(), desc="Measuring"):
        statistics = collector.take(shared)
        if statistics.sample.count:
            rows += measure_input(shared, statistics, block_size(shared), parsed, transforms)

    position = {name: index for index, name in enumerate(linears)}
    rows.sort(key=lambda row: position[row["layer"]])
    frame = pd.DataFrame(rows)
    if unseen := linears.keys() - {row["layer"] for row in rows}:
        names = sorted(unseen, key=position.__getitem__)
        raise UnseenLinearsError(names, frame if rows else None)
    return frame


def parse_names(schemes: Iterable[str], transforms: Iterable[str]) -> list[Scheme]:
    """
    :return: the schemes
    :raises ValueError: if a scheme or a transform is unknown
    """
    if unknown := [name for name in transforms if name not in TRANSFORMS]:
        raise ValueError(
            f"Unknown transform {unknown[0]!r}: it should be one of {', '.join(TRANSFORMS)}"
        )
    return [Scheme.parse(name) for name in schemes]
