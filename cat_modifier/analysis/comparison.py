# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint against its original: each Linear for itself, and end to end"""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.quantization import (
    QuantizationArgs,
    disable_quantization,
    enable_quantization,
)
from compressed_tensors.quantization.utils import is_module_quantized
from loguru import logger
from torch import Tensor
from torch.nn import Linear, Module

from cat_modifier.analysis.experts import fused_experts
from cat_modifier.analysis.layers import UnseenLinearsError
from cat_modifier.analysis.passes import hooked, resumable
from cat_modifier.analysis.workspace import Workspace
from cat_modifier.functional.sqnr import to_db

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """
    :param layers: a row for each quantized Linear; see :func:`compare`
    :param perplexity: of the original and of the checkpoint
    :param divergence: KL divergence of the checkpoint's next-token distribution from the
        original's, mean over tokens, in nats
    :param agreement: share of tokens for which both have the same most likely successor
    :param tokens: which were predicted
    """

    layers: pd.DataFrame
    perplexity: tuple[float, float]
    divergence: float
    agreement: float
    tokens: int


@torch.no_grad()
def compare(
    original: Module,
    quantized: Module,
    batches: Sequence[Tensor],
    workspace: Workspace | None = None,
) -> Comparison:
    """
    Pass the same tokens through both models. Each quantized Linear is also given the input
    which its original has, so that its own error is told from those of all before it.

    The columns of ``layers``: `layer`; `scheme`, as `W4A4`; and in dB

    - `measured_weights_db`: SQNR with the same input, activations not quantized
    - `measured_activations_db`: ratio of the signal to what quantizing activations adds
    - `measured_db`: SQNR with the same input, both quantized
    - `accumulated_db`: SQNR of the outputs within both models, each with its own input

    :param original: a causal language model
    :param quantized: the same with Linears that compressed-tensors has quantized
    :param batches: token ids, each of shape (batch, length), without padding
    :param workspace: keeps the sums, so that the comparison can be resumed
    :raises ValueError: if nothing is quantized, or if the models do not have the same
        Linears
    :raises UnseenLinearsError: if some of them saw no tokens
    """
    if fused := fused_experts(original):
        logger.warning(
            f"{fused[0]} (one of {len(fused)}) holds all experts in one parameter: they are "
            "not among the Linears, and if they are quantized, their activations are not here"
        )
    pairs = _match(original, quantized)
    if folded := _folded(quantized) & pairs.keys():
        logger.info(
            f"{len(folded)} Linears are not compared one by one: their inputs or outputs are "
            "not those of the original, by a transform that is folded into them"
        )
        pairs = {name: pair for name, pair in pairs.items() if name not in folded}
    # of each Linear, energies of the signal and of the errors; and sums over all tokens
    sums: Counter[str] = Counter()

    def load(state: dict[str, Any]):
        sums.clear()
        sums.update(state)

    states = (lambda: dict(sums)), load
    with closing(resumable(batches, "Comparing", workspace, *states)) as remaining:
        for _, ids in remaining:
            # first, so that weights which are decompressed at the first call are in place
            outputs: dict[str, Tensor] = {}
            keep = {
                module: partial(_keep_output, outputs, name)
                for name, (_, module) in pairs.items()
            }
            with hooked(keep):
                other = quantized(ids.to(quantized.device)).logits
            add = {
                linear: partial(_add_errors, sums, name, module, outputs)
                for name, (linear, module) in pairs.items()
            }
            with hooked(add):
                logits = original(ids.to(original.device)).logits
            _add_predictions(sums, ids.to(logits.device), logits, other.to(logits.device))

    rows = []
    unseen = [name for name in pairs if f"{name}/signal" not in sums]
    for name, (_, module) in pairs.items():
        if name in unseen:
            continue
        signal = sums[f"{name}/signal"]
        ratios = {
            error: to_db(signal / noise if noise else float("inf"))
            for error in ("weights", "activations", "joint", "accumulated")
            for noise in (sums[f"{name}/{error}"],)
        }
        rows.append(
            {
                "layer": name,
                "scheme": _scheme_name(module),
                "in_features": module.in_features,
                "out_features": module.out_features,
                "measured_weights_db": ratios["weights"],
                "measured_activations_db": ratios["activations"],
                "measured_db": ratios["joint"],
                "accumulated_db": ratios["accumulated"],
            }
        )
    tokens = sums["tokens"]
    comparison = Comparison(
        pd.DataFrame(rows),
        tuple(
            torch.tensor(sums[key] / tokens, dtype=torch.float64).exp().item()
            for key in ("original", "quantized")
        ),
        sums["divergence"] / tokens,
        sums["agreement"] / tokens,
        int(tokens),
    )
    if unseen:
        raise UnseenLinearsError(unseen, comparison if rows else None)
    return comparison


def _folded(quantized: Module) -> set[str]:
    """Linears of which one has a part of the transform of another's input in its rows"""
    config = getattr(getattr(quantized, "config", None), "quantization_config", None)
    transforms = getattr(config, "cat_transforms", None)
    transforms = getattr(quantized, TRANSFORM_CONFIG_NAME, transforms)
    folded = getattr(transforms, "folded", {})
    return {*folded.keys(), *folded.values()}


def _match(original: Module, quantized: Module) -> dict[str, tuple[Linear, Linear]]:
    modules = dict(original.named_modules())
    pairs = {
        name: (modules.get(name), module)
        for name, module in quantized.named_modules()
        if isinstance(module, Linear) and is_module_quantized(module)
    }
    if not pairs:
        raise ValueError("The checkpoint has no quantized Linears: there is nothing to compare")
    for name, (linear, module) in pairs.items():
        size = (module.out_features, module.in_features)
        if not isinstance(linear, Linear) or tuple(linear.weight.shape) != size:
            raise ValueError(
                f"{name} of the checkpoint has no counterpart of shape {size} in the original: "
                "is it the model that was quantized?"
            )
    return pairs


def _keep_output(
    outputs: dict[str, Tensor], name: str, module: Module, args: tuple, output: Tensor
):
    """Forward hook of a quantized Linear"""
    outputs[name] = output


def _add_errors(
    sums: Counter,
    name: str,
    quantized: Linear,
    outputs: dict[str, Tensor],
    linear: Linear,
    args: tuple,
    exact: Tensor,
):
    """Forward hook of the Linear's original"""
    if name not in outputs:  # the quantized model did without it
        return
    device = next(quantized.parameters()).device
    x = args[0].to(device)
    both = quantized(x).float()
    disable_quantization(quantized)
    try:
        weights_only = quantized(x).float()
    finally:
        enable_quantization(quantized)
    exact = exact.to(device).float()
    signal = exact if linear.bias is None else exact - linear.bias.to(device).float()
    for error, tensor in {
        "signal": signal,
        "weights": weights_only - exact,
        "activations": both - weights_only,
        "joint": both - exact,
        "accumulated": outputs[name].to(device).float() - exact,
    }.items():
        sums[f"{name}/{error}"] += torch.linalg.vector_norm(tensor).double().square().item()


def _add_predictions(sums: Counter, ids: Tensor, logits: Tensor, other: Tensor):
    """All but the last token of each row predict one"""
    original = logits[:, :-1].float().log_softmax(-1)
    quantized = other[:, :-1].float().log_softmax(-1)
    labels = ids[:, 1:, None]
    sums["tokens"] += labels.numel()
    sums["original"] -= original.gather(-1, labels).sum(dtype=torch.float64).item()
    sums["quantized"] -= quantized.gather(-1, labels).sum(dtype=torch.float64).item()
    divergence = (original.exp() * (original - quantized)).sum(-1)
    sums["divergence"] += divergence.sum(dtype=torch.float64).item()
    sums["agreement"] += (original.argmax(-1) == quantized.argmax(-1)).sum().item()


def _scheme_name(module: Module) -> str:
    def bits(args: QuantizationArgs | None) -> str:
        return "16" if args is None else f"{'' if args.type == 'int' else 'F'}{args.num_bits}"

    scheme = module.quantization_scheme
    return f"W{bits(scheme.weights)}A{bits(scheme.input_activations)}"
