# SPDX-License-Identifier: Apache-2.0
"""What is printed after a model was quantized."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from cat_modifier.functional.sqnr import to_db
from cat_modifier.markdown import markdown_table

__all__ = ["summary"]


def summary(
    model: str,
    output: Path,
    before: int,
    after: int,
    minutes: float,
    predictions: Mapping[tuple[str, ...], tuple[float, float]],
) -> str:
    """
    Write what a run has made, and what to do next.

    :param before: bytes of the model
    :param after: bytes of the checkpoint
    :param predictions: see ``CATModifier.predictions``
    """
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for names, pair in predictions.items():
        kind = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        kinds[kind].append(pair)
    lines = [""]
    if kinds:
        rows = [
            (kind, str(len(pairs)), *(f"{_mean_db(pairs, i):.1f}" for i in (0, 1)))
            for kind, pairs in kinds.items()
        ]
        header = ("predicted SQNR, dB, mean", "inputs", "without CAT", "with CAT")
        lines += [markdown_table(header, rows), ""]
    lines += [
        f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB, in {minutes:.1f} minutes",
        f"The checkpoint is in {output}. Next:",
        f"    cat-modifier evaluate {output} --base {model}",
        f"    vllm serve {output}",
    ]
    return "\n".join(lines)


def _mean_db(pairs: list[tuple[float, float]], index: int) -> float:
    return fmean(to_db(pair[index]) for pair in pairs)
