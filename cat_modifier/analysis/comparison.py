# SPDX-License-Identifier: Apache-2.0
"""Comparison of a quantized checkpoint with its original, per Linear and end to end."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.quantization import disable_quantization, enable_quantization
from compressed_tensors.quantization.utils import is_module_quantized
from loguru import logger
from torch import Tensor
from torch.nn import Linear, Module
from tqdm import tqdm

from cat_modifier.analysis.experts import find_fused_experts
from cat_modifier.analysis.layers import call, warn_of_unseen
from cat_modifier.checkpoint.integers import bits_name
from cat_modifier.functional.predictions import compare_predictions
from cat_modifier.functional.sqnr import to_db

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """
    Result of :func:`compare`.

    :param layers: one row per quantized Linear, see :func:`compare`
    :param perplexity: perplexities under the keys `original` and `checkpoint`
    :param kl_divergence: mean KL divergence from the original's next-token distribution, nats
    :param top1_agreement: share of tokens with the same most likely next token in both models
    :param tokens: number of predicted tokens
    """

    layers: pd.DataFrame
    perplexity: dict[str, float]
    kl_divergence: float
    top1_agreement: float
    tokens: int


@torch.no_grad()
def compare(original: Module, quantized: Module, batches: Sequence[Tensor]) -> Comparison:
    """
    Pass the same tokens through both models.

    Each quantized Linear is also called with the input of its original. This separates its
    own error from the errors of the Linears before it.

    ``layers`` has the columns `layer`, `scheme` (such as `W4A4`), `in_features`,
    `out_features`, and in dB:

    - `measured_weights_db`: SQNR with the same input, activations not quantized
    - `measured_activations_db`: signal over the noise that quantized activations add
    - `measured_db`: SQNR with the same input, both quantized
    - `accumulated_db`: SQNR of the outputs inside both models, each with its own input

    :param original: a causal language model
    :param quantized: the same model, with Linears quantized by compressed-tensors
    :param batches: token ids, each of shape (batch, length), without padding
    :raises ValueError: if nothing is quantized, the models do not have the same Linears, or no
        Linear saw tokens. Linears that saw none are not in the result, with a warning
    """
    pairs = _match(original, quantized)
    energies: dict[str, dict[str, float]] = {name: defaultdict(float) for name in pairs}
    totals: dict[str, float] = defaultdict(float)
    outputs: dict[str, Tensor] = {}
    keep = {
        module: lambda module, args, output, name=name: outputs.update({name: output})
        for name, (_, module) in pairs.items()
    }
    for ids in tqdm(batches, desc="Comparing"):
        outputs.clear()
        # the quantized model first: its first call may decompress its weights
        other = call(quantized, ids, keep).logits
        add = {
            pairs[name][0]: partial(_add_errors, energies[name], pairs[name][1], output)
            for name, output in outputs.items()
        }
        logits = call(original, ids, add).logits
        _add_predictions(totals, ids.to(logits.device), logits, other.to(logits.device))

    warn_of_unseen(energies, [name for name, sums in energies.items() if sums])
    rows = [_row(name, pairs[name][1], sums) for name, sums in energies.items() if sums]
    means = {key: total / totals["tokens"] for key, total in totals.items()}
    perplexity = {
        "original": math.exp(means["reference_loss"]),
        "checkpoint": math.exp(means["loss"]),
    }
    scalars = perplexity, means["divergence"], means["agreement"], int(totals["tokens"])
    return Comparison(pd.DataFrame(rows), *scalars)


def _match(original: Module, quantized: Module) -> dict[str, tuple[Any, Linear]]:
    """Pair the quantized Linears with their originals, by full name"""
    if experts := find_fused_experts(original):
        logger.warning(
            f"{experts[0]} (one of {len(experts)}) holds all experts in one parameter. These "
            "experts are not compared, because they are not Linears"
        )
    config = getattr(getattr(quantized, "config", None), "quantization_config", None)
    transforms = getattr(config, "cat_transforms", None)
    fused = getattr(getattr(quantized, TRANSFORM_CONFIG_NAME, transforms), "fused", {})
    if fused:
        logger.info(
            "Pairs of Linears with a transform fused between them are not compared: "
            f"{', '.join(f'{value} and {output}' for output, value in fused.items())}"
        )
    modules = dict(original.named_modules())
    pairs = {
        name: (modules.get(name), module)
        for name, module in quantized.named_modules()
        if isinstance(module, Linear) and is_module_quantized(module)
        if name not in {*fused.keys(), *fused.values()}
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


def _add_errors(
    energies: dict[str, float],
    quantized: Linear,
    accumulated: Tensor,
    linear: Linear,
    args: tuple,
    exact: Tensor,
):
    """
    Add the errors of a quantized Linear. A forward hook of its original.

    :param energies: sums of signal and errors, to be added to
    :param accumulated: output of the quantized Linear inside the quantized model
    :param exact: output of the original
    """
    device = next(quantized.parameters()).device
    x = args[0].to(device)
    both = quantized(x).float()
    disable_quantization(quantized)
    try:
        weights_only = quantized(x).float()
    finally:
        enable_quantization(quantized)
    exact = exact.to(device).float()
    for name, tensor in {
        "signal": exact if linear.bias is None else exact - linear.bias.to(device).float(),
        "measured_weights_db": weights_only - exact,
        "measured_activations_db": both - weights_only,
        "measured_db": both - exact,
        "accumulated_db": accumulated.to(device).float() - exact,
    }.items():
        energies[name] += torch.linalg.vector_norm(tensor).double().square().item()


def _row(name: str, module: Any, energies: dict[str, float]) -> dict[str, str | int | float]:
    scheme = module.quantization_scheme
    bits = bits_name(scheme.weights, scheme.input_activations)
    sizes = {"in_features": module.in_features, "out_features": module.out_features}
    signal = energies.pop("signal")
    ratios = {key: to_db(signal / e if e else math.inf) for key, e in energies.items()}
    return {"layer": name, "scheme": bits} | sizes | ratios


def _add_predictions(totals: dict[str, float], ids: Tensor, logits: Tensor, other: Tensor):
    """Add the log-likelihoods and their differences, over all tokens but each row's last"""
    tokens = ids.shape[1] - 1
    totals["tokens"] += ids.shape[0] * tokens
    for name, means in compare_predictions(ids, other, logits).items():
        totals[name] += means.sum().item() * tokens
