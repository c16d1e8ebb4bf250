# SPDX-License-Identifier: Apache-2.0
"""The analysis of a model: from data to a table of numbers."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from compressed_tensors import match_named_modules
from torch.nn import Linear, Module
from tqdm import tqdm

from cat_modifier.analysis.experts import fused_experts
from cat_modifier.analysis.inputs import AnalysisStatistics
from cat_modifier.analysis.measure import measure_input
from cat_modifier.analysis.passes import Batch, call, hooked
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.transforms import TRANSFORMS, check_transforms
from cat_modifier.calibration.collector import InputCollector
from cat_modifier.calibration.shared_inputs import DEFAULT_IGNORE, SharedInput
from cat_modifier.functional.layout import Rotation, choose_layout

__all__ = ["DEFAULT_SCHEMES", "DEFAULT_TRANSFORMS", "UnseenLinearsError", "analyze"]

DEFAULT_SCHEMES = ("W4A4", "W4A8", "W8A8", "W6A6")
DEFAULT_TRANSFORMS = tuple(
    name for name, transform in TRANSFORMS.items() if not transform.needs_whole_moments
)

_SAMPLE_SIZE = 128
"""Tokens of each input on which SQNR is measured"""


class UnseenLinearsError(ValueError):
    """
    Some Linears saw no tokens.

    :param names: names of the Linears
    :param results: results of the other Linears; None if there are none
    """

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
    parsed = [Scheme.parse(name) for name in schemes]
    check_transforms(transforms)
    if not parsed or not transforms or not len(batches):
        raise ValueError("The analysis needs a scheme, a transform and a batch at least")
    if transform_block_size < 1:
        raise ValueError(f"`transform_block_size` must be positive, got {transform_block_size}")
    linears = _find_linears(model, list(targets), list(ignore))
    _check_groups(linears, parsed)

    def block_size(shared: SharedInput) -> int:
        sizes = shared.in_features, 1, transform_block_size
        return choose_layout(shared.first, *sizes, Rotation.NONE).block_size

    def new_statistics(shared: SharedInput) -> AnalysisStatistics:
        is_whole = any(TRANSFORMS[name].needs_whole_moments for name in transforms)
        known = shared.in_features if is_whole else block_size(shared)
        return AnalysisStatistics(shared.in_features, known, _SAMPLE_SIZE)

    collector = InputCollector(linears, new_statistics)

    def observe(name: str, index: int, module: Module, args: tuple, output: Any):
        collector.observe(name, args[0], index)

    for index, batch in enumerate(tqdm(batches, desc="Calibrating")):
        if not torch.is_tensor(batch):
            collector.set_attention_mask(index, batch.get("attention_mask"))
        with hooked({linear: partial(observe, n, index) for n, linear in linears.items()}):
            call(model, batch)
    rows = []
    for shared in tqdm(collector.pending(), desc="Measuring"):
        statistics = collector.take(shared)
        if statistics.sample.count:
            rows += measure_input(shared, statistics, block_size(shared), parsed, transforms)

    seen = {row["layer"] for row in rows}
    position = {name: index for index, name in enumerate(linears)}
    rows.sort(key=lambda row: position[row["layer"]])
    frame = pd.DataFrame(rows)
    if unseen := [name for name in linears if name not in seen]:
        raise UnseenLinearsError(unseen, frame if rows else None)
    return frame


def _find_linears(model: Module, targets: list[str], ignore: list[str]) -> dict[str, Linear]:
    """Find the Linears by full name, in the order of the model"""
    if fused := fused_experts(model, ignore):
        raise ValueError(
            f"{fused[0]} (one of {len(fused)}) holds all experts in one parameter, not in "
            "Linears: call `llmcompressor.modeling.moe.linearize.linearize_moe(model)` first, "
            "or add it to `ignore`"
        )
    matches = match_named_modules(model, targets, ignore)
    linears = {name: module for name, module in matches if isinstance(module, Linear)}
    if not linears:
        raise ValueError(
            f"The model has no torch.nn.Linear for targets {targets} and ignore {ignore}: "
            "check the names with `model.named_modules()`"
        )
    return linears


def _check_groups(linears: dict[str, Linear], schemes: Sequence[Scheme]):
    """Check before the pass over the data that groups of channels divide all inputs"""
    for scheme in schemes:
        groups = {args.group_size for args in (scheme.weights, scheme.activations) if args}
        for size in groups - {None}:
            for name, linear in linears.items():
                if linear.in_features % size:
                    raise ValueError(
                        f"Groups of {size} channels (scheme {scheme.name}) do not divide the "
                        f"{linear.in_features} inputs of {name}: choose another size, or add "
                        "the Linear to `ignore`"
                    )
