# SPDX-License-Identifier: Apache-2.0
"""From the statistics of an input to the SQNR of the Linears that read it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.utils import align_module_device, get_execution_device

from cat_modifier.analysis.compared_transforms import (
    TRANSFORMS,
    AnalysisStatistics,
    AnalyzedInput,
)
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional import sqnr
from cat_modifier.functional.alignment import matrix_power, transformed_energy
from cat_modifier.functional.stored import dequantize_blocks

__all__ = ["measure_input"]


@torch.no_grad()
def measure_input(
    shared: SharedInput,
    statistics: AnalysisStatistics,
    block_size: int,
    schemes: Sequence[Scheme],
    transforms: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """
    Predict and measure the SQNR of each Linear that reads an input.

    One row per Linear, transform and scheme. Columns:

    - `layer`: full name of the Linear
    - `input`: name of the first Linear that reads the same input
    - `in_features`, `out_features`, `transform`, `scheme`
    - `block_size`: k of the transform
    - `tokens`: number of tokens seen
    - `largest_token`: energy of the largest token over the mean. If it is large, a few tokens
      dominate predictions, and their noise is not uniform

    Columns in dB, see :mod:`cat_modifier.functional.sqnr`:

    - `weight_concentration_db`, `activation_concentration_db`: C(W) and C(x), transformed
    - `alignment_db`: A(x, W)
    - `achievable_block_db`: best alignment over all transforms with blocks of k, if no other
      Linear read the input
    - `achievable_full_db`: best alignment over all transforms, if no other Linear read the
      input; nan unless all of Sx is known
    - `predicted_weights_db`, `predicted_activations_db`, `predicted_db`: SQNR by lemma 2.3,
      lemma 2.2 and theorem 2.4, with weights, activations or both quantized
    - `measured_weights_db`, `measured_activations_db`, `measured_db`: measured SQNR. Values
      are rounded to the nearest integer in the range of their channel, token or group

    :param shared: input and the Linears that read it
    :param statistics: statistics of the input
    :param block_size: k of CAT
    :param schemes: schemes to quantize with
    :param transforms: names in ``TRANSFORMS``
    :raises ValueError: if a weight or the input is not finite
    """
    device = get_execution_device(shared.linears[shared.first])
    weights = {}
    for name, linear in shared.linears.items():
        with align_module_device(linear):
            weights[name] = linear.weight.detach().to(device, torch.float32)
    second_moments, maxima = statistics.second_moments.mean, statistics.maxima
    sample = statistics.sample
    assert second_moments is not None and maxima is not None and sample.tokens is not None
    x = sample.tokens.to(device)
    token_weights = sample.weights.to(device)
    for name, tensor in {f"The input of {shared.first}": x, **weights}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")
    data = AnalyzedInput(shared, second_moments, maxima, block_size, weights)
    largest = torch.linalg.vector_norm(x, dim=-1).max().item() ** 2
    mean = data.sx(1).sum().item()
    # the sample gives the ratio of output to input energy accurately, but not each energy
    scale = mean / (sqnr.energy(x, token_weights) or math.nan)
    outputs = {n: sqnr.energy(x @ w.T, token_weights) * scale for n, w in weights.items()}
    best_block = _achievable(data, block_size, outputs)
    best_full = _achievable(data, shared.in_features, outputs)
    # products in bfloat16 are accurate enough, and faster
    dtypes = {linear.weight.dtype for linear in shared.linears.values()}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    for transform in transforms:
        fused = TRANSFORMS[transform].compute(data)
        sx = data.sx(fused.layout.block_size)
        input_energy = transformed_energy(dequantize_blocks(fused.blocks, sx.dtype), sx)
        tokens = fused.transform_tokens(x)
        token_channels = token_weights.float() @ tokens.square() / token_weights.sum().float()
        for name, original in weights.items():
            weight = fused.transform_weight(original)
            pairs = [(scheme.weights, scheme.activations) for scheme in schemes]
            measurements = sqnr.measured_sqnr(tokens, weight, pairs, token_weights, dtype)
            weight_channels = torch.linalg.vector_norm(weight, dim=0).square()
            weight_energy = weight_channels.double().sum().item()
            aligned = sqnr.alignment(outputs[name], weight_energy, input_energy)
            for scheme, measured in zip(schemes, measurements, strict=True):
                concentrations = (
                    sqnr.concentration(weight, scheme.weights, None, token_channels),
                    sqnr.concentration(
                        tokens, scheme.activations, token_weights, weight_channels
                    ),
                )
                predicted = sqnr.predicted_sqnr(*scheme.bits, *concentrations, aligned)
                yield {
                    "layer": name,
                    "input": shared.first,
                    "in_features": shared.in_features,
                    "out_features": original.shape[0],
                    "transform": transform,
                    "scheme": scheme.name,
                    "block_size": fused.layout.block_size,
                    "weight_concentration_db": sqnr.to_db(concentrations[0]),
                    "activation_concentration_db": sqnr.to_db(concentrations[1]),
                    "alignment_db": sqnr.to_db(aligned),
                    "achievable_block_db": sqnr.to_db(best_block[name]),
                    "achievable_full_db": sqnr.to_db(best_full[name]),
                    "predicted_weights_db": sqnr.to_db(predicted.weights),
                    "predicted_activations_db": sqnr.to_db(predicted.activations),
                    "predicted_db": sqnr.to_db(predicted.joint),
                    "measured_weights_db": sqnr.to_db(measured.weights),
                    "measured_activations_db": sqnr.to_db(measured.activations),
                    "measured_db": sqnr.to_db(measured.joint),
                    "tokens": sample.count,
                    "largest_token": largest / mean if mean else math.nan,
                }


def _achievable(
    data: AnalyzedInput, block_size: int, outputs: Mapping[str, float]
) -> dict[str, float]:
    """
    Compute the best alignment of each Linear over all transforms with blocks of this size.

    :param outputs: ``E||W x||^2`` by the name of the Linear
    :return: nan if the blocks of Sx are not known
    """
    if block_size > data.second_moments.shape[-1]:
        return dict.fromkeys(outputs, math.nan)
    sx_root, sw = matrix_power(data.sx(block_size), 0.5), data.sw(block_size)
    return {n: sqnr.achievable_alignment(e, sx_root, sw[n]) for n, e in outputs.items()}
