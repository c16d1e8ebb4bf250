# SPDX-License-Identifier: Apache-2.0
"""The analysis itself: from a model and data to a table of numbers"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import tqdm
from compressed_tensors import match_named_modules
from torch.nn import Linear, Module

from cat_modifier.analysis.experts import fused_experts
from cat_modifier.analysis.measure import measure_group
from cat_modifier.analysis.passes import Batch, calibrate
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.statistics import AnalysisStatistics
from cat_modifier.analysis.transforms import TRANSFORMS
from cat_modifier.analysis.workspace import Workspace
from cat_modifier.calibration.shared_inputs import DEFAULT_IGNORE, SharedInput
from cat_modifier.functional.layout import choose_layout
from cat_modifier.functional.layout import Rotation

__all__ = [
    "DEFAULT_SCHEMES",
    "DEFAULT_TRANSFORMS",
    "UnseenLinearsError",
    "analyze",
    "find_linears",
]

DEFAULT_SCHEMES = ("W4A4", "W4A8", "W8A8", "W6A6")
DEFAULT_TRANSFORMS = tuple(
    name for name, transform in TRANSFORMS.items() if not transform.needs_whole_moments
)

_SAMPLE_SIZE = 128
"""Tokens of each input on which SQNR is measured"""


class UnseenLinearsError(ValueError):
    """
    Some Linears saw no tokens.

    :param names: of them
    :param results: of all others; None if there are none
    """

    def __init__(self, names: list[str], results: Any):
        self.names, self.results = names, results
        super().__init__(
            f"{len(names)} Linears saw no tokens, and are not in the results: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Use more data, or add "
            "them to `ignore`"
        )


def find_linears(
    model: Module, targets: Iterable[str] = ("Linear",), ignore: Iterable[str] = DEFAULT_IGNORE
) -> dict[str, Linear]:
    """
    :param targets: by name, class or `re:` pattern, as in llm-compressor
    :param ignore: exceptions from `targets`
    :return: by full name, in the order of the model
    :raises ValueError: if there are none
    """
    linears = {
        name: module
        for name, module in match_named_modules(model, targets, ignore)
        if isinstance(module, Linear)
    }
    if not linears:
        raise ValueError(
            f"The model has no torch.nn.Linear for targets {list(targets)} and ignore "
            f"{list(ignore)}: check the names with `model.named_modules()`"
        )
    return linears


def analyze(
    model: Module,
    batches: Sequence[Batch],
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    transforms: Sequence[str] = DEFAULT_TRANSFORMS,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = DEFAULT_IGNORE,
    block_size: int = 128,
    workspace: Workspace | None = None,
) -> pd.DataFrame:
    """
    Predict and measure the quantization error of every Linear, under each transform and
    scheme, in one pass over the data.

    :param model: any module; Linears are found, and grouped by the input that they read
    :param batches: what the model is called with: token ids, or keyword arguments
    :param schemes: see :meth:`Scheme.parse`
    :param transforms: names in ``TRANSFORMS``
    :param targets: Linears, by name, class or `re:` pattern
    :param ignore: exceptions from `targets`
    :param block_size: of CAT, as in CATModifier
    :param workspace: keeps what was computed, so that it can be resumed
    :return: one row for each :class:`cat_modifier.analysis.measure.LayerResult`
    :raises ValueError: for unknown names, if there are no Linears or no data, if experts are
        not Linears, or if activations are not finite
    :raises UnseenLinearsError: if some of the Linears saw no tokens; it holds the results
    """
    schemes = [Scheme.parse(name) for name in schemes]
    if unknown := [name for name in transforms if name not in TRANSFORMS]:
        raise ValueError(
            f"Unknown transform {unknown[0]!r}: it should be one of {', '.join(TRANSFORMS)}"
        )
    if not schemes or not transforms or not len(batches):
        raise ValueError("The analysis needs a scheme, a transform and a batch at least")
    if block_size < 1:
        raise ValueError(f"`block_size` must be positive, got {block_size}")
    if fused := fused_experts(model, ignore):
        raise ValueError(
            f"{fused[0]} (one of {len(fused)}) holds all experts in one parameter, not in "
            "Linears: call `llmcompressor.modeling.moe.linearize.linearize_moe(model)` first, "
            "or add it to `ignore`"
        )
    linears = find_linears(model, targets, ignore)
    _check_groups(linears, schemes)

    needs_whole_moments = any(TRANSFORMS[name].needs_whole_moments for name in transforms)

    def block_size_of(group: SharedInput) -> int:
        layout = choose_layout(group.first, group.in_features, 1, block_size, Rotation.NONE)
        return layout.block_size

    def new_statistics(group: SharedInput) -> AnalysisStatistics:
        known = group.in_features if needs_whole_moments else block_size_of(group)
        return AnalysisStatistics(group.in_features, known, _SAMPLE_SIZE)

    calibration = calibrate(model, linears, batches, new_statistics, workspace)
    rows = workspace.load_rows() if workspace is not None else {}
    for group in tqdm.tqdm(calibration.pending_groups(), desc="Measuring"):
        statistics = calibration.take(group)
        if group.first in rows or not statistics.sample.count:
            continue
        results = measure_group(group, statistics, block_size_of(group), schemes, transforms)
        rows[group.first] = results = [asdict(result) for result in results]
        if workspace is not None:
            workspace.add_rows(group.first, results)

    frame = pd.DataFrame([row for results in rows.values() for row in results])
    seen = set(frame["layer"]) if len(frame) else set()
    if unseen := [name for name in linears if name not in seen]:
        raise UnseenLinearsError(unseen, frame if len(frame) else None)
    position = {name: index for index, name in enumerate(linears)}
    return frame.sort_values("layer", key=lambda names: names.map(position), kind="stable")


def _check_groups(linears: dict[str, Linear], schemes: Sequence[Scheme]):
    """Before the pass over the data: whether groups of channels divide all inputs"""
    for scheme in schemes:
        for args in (scheme.weights, scheme.activations):
            size = args and args.group_size
            for name, linear in linears.items():
                if size and linear.in_features % size:
                    raise ValueError(
                        f"Groups of {size} channels (scheme {scheme.name}) do not divide the "
                        f"{linear.in_features} inputs of {name}: choose another size, or add "
                        "the Linear to `ignore`"
                    )
