# SPDX-License-Identifier: Apache-2.0
"""The analysis of a model: from data to a table of numbers."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from compressed_tensors import match_named_modules
from compressed_tensors.utils import get_execution_device
from loguru import logger
from torch import Tensor
from torch.nn import Linear, Module
from tqdm import tqdm

from cat_modifier.analysis.compared_transforms import TRANSFORMS, WHOLE, AnalysisStatistics
from cat_modifier.analysis.experts import find_fused_experts
from cat_modifier.analysis.measure import measure_input
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.calibration.collector import InputCollector
from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE
from cat_modifier.calibration.padding import PaddingMasks
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.layout import Rotation, choose_layout

__all__ = ["DEFAULT_SCHEMES", "DEFAULT_TRANSFORMS", "Batch"]
__all__ += ["analyze", "call", "parse_names", "warn_of_unseen", "without_predictions"]

Batch = Tensor | Mapping[str, Any]  # first argument of the model, or keyword arguments

DEFAULT_SCHEMES = ("W4A4", "W4A8", "W8A8", "W6A6")
DEFAULT_TRANSFORMS = tuple(name for name in TRANSFORMS if name != WHOLE)

_SAMPLE_SIZE = 128  # tokens of each input on which SQNR is measured


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
    Predict and measure the quantization error of every Linear in one pass over the data.

    :param model: any module
    :param batches: arguments of the model: token ids, or keyword arguments
    :param schemes: names, see :meth:`Scheme.parse`
    :param transforms: names in ``TRANSFORMS``
    :param targets: Linears by name, class or `re:` pattern
    :param ignore: exceptions from `targets`
    :param transform_block_size: k of CAT, as in CATModifier
    :return: one row per Linear, transform and scheme; columns as in
        :func:`cat_modifier.analysis.measure.measure_input`
    :raises ValueError: if the arguments do not fit the model, values are not finite, or no
        Linear saw tokens. Linears that saw none are not in the result, with a warning
    """
    parsed = parse_names(schemes, transforms)
    if not parsed or not transforms or not len(batches):
        raise ValueError("The analysis needs at least one scheme, one transform and one batch")
    if transform_block_size < 1:
        raise ValueError(f"`transform_block_size` must be positive, got {transform_block_size}")
    linears = _find_linears(model, list(targets), list(ignore))

    def block_size(shared: SharedInput) -> int:
        sizes = shared.in_features, 1, transform_block_size
        return choose_layout(shared.first, *sizes, Rotation.NONE).block_size

    def new_statistics(shared: SharedInput) -> AnalysisStatistics:
        for scheme in parsed:
            scheme.check(shared.first, shared.in_features)
        known = shared.in_features if WHOLE in transforms else block_size(shared)
        return AnalysisStatistics(shared.in_features, known, _SAMPLE_SIZE)

    collector = InputCollector(linears, new_statistics, PaddingMasks(model))

    def observe(name: str, index: int, module: Module, args: tuple, output: Any):
        collector.observe(name, args[0], index)

    for index, batch in enumerate(tqdm(batches, desc="Calibrating")):
        hooks = {linear: partial(observe, name, index) for name, linear in linears.items()}
        with collector.masks.watching(model, index):
            call(model, batch, hooks)
    rows: list[dict[str, Any]] = []
    for shared in tqdm(collector.pending(), desc="Measuring"):
        statistics = collector.take(shared)
        if statistics.sample.count:
            rows += measure_input(shared, statistics, block_size(shared), parsed, transforms)

    position = {name: index for index, name in enumerate(linears)}
    warn_of_unseen(linears, {row["layer"] for row in rows})
    return pd.DataFrame(sorted(rows, key=lambda row: position[row["layer"]]))


def warn_of_unseen(names: Iterable[str], seen: Collection[str]):
    """
    Warn of the Linears that saw no tokens.

    :raises ValueError: if there are no others
    """
    if unseen := [name for name in names if name not in seen]:
        message = f"{len(unseen)} Linears saw no tokens and are not in the results: "
        message += f"{', '.join(unseen[:5])}{', ...' if len(unseen) > 5 else ''}. Use more data"
        if not seen:
            raise ValueError(message)
        logger.warning(message)


def _find_linears(model: Module, targets: list[str], ignore: list[str]) -> dict[str, Linear]:
    """Find the Linears by full name, in the order of the model"""
    if fused := find_fused_experts(model, ignore):
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


def parse_names(schemes: Iterable[str], transforms: Iterable[str]) -> list[Scheme]:
    """
    Parse the names of schemes, and check the names of transforms.

    :raises ValueError: if a name is unknown
    """
    if unknown := [name for name in transforms if name not in TRANSFORMS]:
        raise ValueError(
            f"Unknown transform {unknown[0]!r}: it should be one of {', '.join(TRANSFORMS)}"
        )
    return [Scheme.parse(name) for name in schemes]


def call(model: Module, batch: Batch, hooks: Mapping[Any, Callable]) -> Any:
    """
    Call a model with a batch.

    :param hooks: forward hooks by module, removed after the call
    """
    device = get_execution_device(model)
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        if torch.is_tensor(batch):
            return model(batch.to(device))
        tensors = {k: v.to(device) for k, v in batch.items() if torch.is_tensor(v)}
        return model(**dict(batch) | tensors)
    finally:
        for handle in handles:
            handle.remove()


def without_predictions(model: Module, ids: Tensor) -> Batch:
    """Make a batch that asks a causal language model for as few logits as it can return"""
    batch = {"input_ids": ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    return batch
