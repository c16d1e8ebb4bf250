# SPDX-License-Identifier: Apache-2.0
"""
Signal-to-quantization-noise ratio (SQNR) of a quantized Linear, and its factors: bit
width, concentration and alignment (arXiv 2603.04359, lemmas 2.1-2.3 and theorem 2.4).

A Linear is ``y = W x`` with ``W`` of shape (out, d). Expectations are taken over tokens, the
rows of a tensor. ``token_weights`` weight the tokens; all tokens count the same by default.
All results are ratios of energies, without a unit. :func:`to_db` converts a ratio to dB.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    fake_quantize,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

__all__ = [
    "SQNR",
    "achievable_alignment",
    "alignment",
    "concentration",
    "energy",
    "joint_db",
    "measured_sqnr",
    "parallel_sum",
    "predicted_sqnr",
    "quantization_range",
    "quantize_by_range",
    "range_ends",
    "to_db",
]


class SQNR(NamedTuple):
    """
    Energy of the exact output ``W x`` over the energy of its error.

    :param weights: only weights are quantized, ``Wq x``
    :param activations: only activations are quantized, ``W xq``
    :param joint: both are quantized, ``Wq xq``
    """

    weights: float
    activations: float
    joint: float


def to_db(ratio: float) -> float:
    """Compute ``10 log10(ratio)``: -inf for a ratio of 0, nan for nan"""
    if math.isnan(ratio):
        return math.nan
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def joint_db(a: Any, b: Any) -> Any:
    """Compute the SQNR with two independent errors from the SQNR with each error, dB"""
    return -10 * np.log10(10 ** (-a / 10) + 10 ** (-b / 10))


def energy(x: Tensor, token_weights: Tensor | None = None) -> float:
    """
    Compute ``E||x||^2``.

    :param x: shape (tokens, d)
    :param token_weights: shape (tokens,); they need not sum to 1; None for equal weights
    """
    # at least float32: squares overflow or vanish in 16 bits
    dtype = torch.promote_types(x.dtype, torch.float32)
    energies = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).double().square()
    if token_weights is None:
        return energies.mean().item()
    return (energies @ token_weights / token_weights.sum()).item()


def range_ends(x: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """
    Find the range of all values that share a scale.

    A symmetric range is ``-max|x_i|`` to ``max|x_i|``. An asymmetric range is ``min(x, 0)``
    to ``max(x, 0)``.

    `args.strategy` says which values share a scale:

    - `token`, `channel`: one row
    - `group`, `tensor_group`: `group_size` channels of one row
    - `block`: a rectangle of a weight
    - `tensor`: all values

    The last group of a row, and the last blocks of a weight, may be incomplete.

    :param x: tokens or rows of a weight, shape (rows, d)
    :param args: strategy and symmetry; the bits are not read
    :return: lower and upper ends, each of shape (rows, d/g): one range per g channels of a
        row. g is d where a row has one range
    :raises ValueError: if a Linear cannot be quantized with the strategy
    """
    height, width = _tile(x.shape, args)
    tiles = _padded(x, height, width).unflatten(0, (-1, height)).unflatten(-1, (-1, width))
    rows = x.shape[0]
    low = tiles.amin((1, 3)).clamp_max(0).repeat_interleave(height, 0)[:rows]
    high = tiles.amax((1, 3)).clamp_min(0).repeat_interleave(height, 0)[:rows]
    if args.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def quantization_range(x: Tensor, args: QuantizationArgs) -> Tensor:
    """
    Compute the width of each range of values, zero included.

    :param x: shape (rows, d)
    :param args: see :func:`range_ends`
    :return: shape (rows, d/g)
    """
    low, high = range_ends(x, args)
    return high - low


def _tile(shape: torch.Size, args: QuantizationArgs) -> tuple[int, int]:
    """Find the number of rows and of channels that share a scale"""
    strategy = QuantizationStrategy(args.strategy)
    rows, channels = shape
    if strategy in (QuantizationStrategy.TOKEN, QuantizationStrategy.CHANNEL):
        return 1, channels
    if strategy is QuantizationStrategy.TENSOR:
        return rows, channels
    if strategy is QuantizationStrategy.BLOCK:
        return tuple(args.block_structure)
    if strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        return 1, args.group_size
    raise ValueError(
        f"Quantization with strategy `{strategy.value}` cannot be simulated for a Linear: use "
        "`tensor`, `channel`, `token`, `group`, `tensor_group` or `block`"
    )


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """Fill incomplete tiles with zeros. Ranges stay the same, since each contains zero"""
    rows, channels = x.shape
    missing = (0, -channels % width, 0, -rows % height)
    return torch.nn.functional.pad(x, missing) if any(missing) else x


def quantize_by_range(x: Tensor, args: QuantizationArgs, ratio: float | Tensor = 1.0) -> Tensor:
    """
    Quantize like compressed-tensors, and dequantize.

    With ratio 1, each range ends at its least and greatest value. That is right for dynamic
    activations, and for weights of observer `minmax`. Other observers choose other ranges.

    :param x: shape (rows, d)
    :param args: quantization to integers, or floats of 4 or 8 bits; see :func:`range_ends`.
        The global scale of `tensor_group` is computed from x
    :param ratio: width of each range over the width of its values; broadcasts to (rows, d/g)
    :return: shape (rows, d), dtype of x
    """
    if x.numel() == 0:
        return x
    low, high = (end * ratio for end in range_ends(x, args))
    global_scale = None
    # compressed-tensors has no global scale where all scales are computed at run time
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and args.dynamic is not True:
        global_scale = generate_gparam(low.min(), high.max())
    scale, zero_point = calculate_qparams(low, high, args, global_scale)
    # reshape each range to one row: strategies of compressed-tensors differ in the shape of
    # scales, one scale per row suits all
    row = QuantizationArgs(
        num_bits=args.num_bits, type=args.type, symmetric=args.symmetric, strategy="channel"
    )
    _, width = _tile(x.shape, args)
    padded = _padded(x, 1, width)
    scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    rows = padded.reshape(-1, width)
    # a global scale in float32 turns 16-bit values into float32
    quantized = fake_quantize(rows, scale, zero_point, row, global_scale).to(x.dtype)
    return quantized.view(padded.shape)[:, : x.shape[-1]]


def concentration(
    x: Tensor,
    args: QuantizationArgs | None,
    row_weights: Tensor | None = None,
    channel_energies: Tensor | None = None,
) -> float:
    """
    Compute how well values fill their range r: ``C(x) = E||x||^2 / E[r(x)^2]`` for
    activations, ``C(W) = sum_j ||w_j||^2 / sum_j r(w_j)^2`` for the rows of a weight
    [lemmas 2.2, 2.3].

    A row may have several ranges, one per group of channels. The noise in a group is
    multiplied by the same channels of the other factor of the product. Its energies
    therefore weight the squared ranges, so that :func:`predicted_sqnr` stays valid.

    :param x: tokens or rows of a weight, shape (rows, d), floating point
    :param args: see :func:`range_ends`; None for no quantization
    :param row_weights: weights of the tokens, shape (rows,); None for equal weights
    :param channel_energies: energy of each channel of the other factor, shape (d,): the
        squared column norms of W for activations, ``E[x_i^2]`` for weights. Only their ratios
        matter; None for equal energies
    :return: nan if x is zero or not quantized
    """
    if args is None:
        return math.nan
    squared = quantization_range(x, args).to(torch.float64).square()
    if channel_energies is None:
        squared = squared.mean(-1)
    else:
        _, width = _tile(x.shape, args)
        padded = _padded(channel_energies[None].to(squared), 1, width)
        shares = padded.unflatten(-1, (-1, width)).sum((0, -1))
        squared = squared @ (shares / shares.sum())
    if row_weights is not None:
        squared = squared * (row_weights.to(squared) / row_weights.sum())
        mean = squared.sum().item()
    else:
        mean = squared.mean().item()
    return energy(x, row_weights) / mean if mean else math.nan


def alignment(output_energy: float, weight_energy: float, input_energy: float) -> float:
    """
    Compute ``A(x, W) = E||W x||^2 / (||W||_F^2 E||x||^2)``, between 0 and 1.

    :param output_energy: ``E||W x||^2``, summed over the Linears that read the input
    :param weight_energy: ``||W||_F^2``, summed over the Linears that read the input
    :param input_energy: ``E||x||^2``
    :return: nan if the weight or the input is zero
    """
    product = weight_energy * input_energy
    return output_energy / product if product else math.nan


def achievable_alignment(output_energy: float, sx_root: Tensor, sw: Tensor) -> float:
    """
    Compute the best alignment over all invertible block-diagonal transforms with blocks of
    k. With k = d, these are all invertible transforms.

    ``A* = E||W x||^2 / (sum_i ||W_i Sx_ii^(1/2)||_*)^2``, where ``||.||_*`` is the nuclear
    norm and ``W_i`` are the columns of block i. It is the alignment of the transform that
    :mod:`cat_modifier.functional.alignment` derives.

    :param output_energy: ``E||W x||^2``, summed over the Linears that share the transform
    :param sx_root: square roots of the diagonal blocks of Sx, ``matrix_power(blocks, 0.5)``,
        shape (d/k, k, k), float64
    :param sw: diagonal blocks of Sw, shape (d/k, k, k), float64
    :return: nan if the weight or the input is zero
    """
    values = torch.linalg.eigvalsh(sx_root @ sw @ sx_root)
    nuclear_norm = values.clamp_min(0).sqrt().sum().item()
    return output_energy / nuclear_norm**2 if nuclear_norm else math.nan


def predicted_sqnr(
    weight_bits: int | None,
    activation_bits: int | None,
    weight_concentration: float,
    activation_concentration: float,
    alignment: float,
) -> SQNR:
    """
    Predict SQNR by theorem 2.4, for any two bit widths.

    A range r of b bits has ``N(b) = 2^b - 1`` intervals. Uniform rounding noise then has
    energy ``r^2 / (12 N(b)^2)`` per value. SQNR is ``12 N(b)^2 C A``, for weights and for
    activations [lemmas 2.2, 2.3]. The joint SQNR is the parallel sum of the two [lemma 2.1].

    :param weight_bits: bits of a weight; None if weights are not quantized
    :param activation_bits: bits of an activation; None if activations are not quantized
    :param weight_concentration: C(W), see :func:`concentration`
    :param activation_concentration: C(x)
    :param alignment: A(x, W), see :func:`alignment`
    :return: inf where nothing is quantized; nan for zero weights or inputs
    """

    def ratio(bits: int | None, concentration: float) -> float:
        return math.inf if bits is None else 12 * (2**bits - 1) ** 2 * concentration * alignment

    weights = ratio(weight_bits, weight_concentration)
    activations = ratio(activation_bits, activation_concentration)
    return SQNR(weights, activations, parallel_sum(weights, activations))


def parallel_sum(a: float, b: float) -> float:
    """Compute ``1 / (1/a + 1/b)``, the SQNR with two independent errors of SQNR a and b"""
    if 0 in (a, b):
        return 0.0
    noise = 1 / a + 1 / b
    return 1 / noise if noise else math.inf


def measured_sqnr(
    x: Tensor,
    weight: Tensor,
    schemes: Sequence[tuple[QuantizationArgs | None, QuantizationArgs | None]],
    token_weights: Tensor | None = None,
    product_dtype: torch.dtype = torch.float32,
) -> list[SQNR]:
    """
    Quantize, multiply, and compare with the exact product.

    The error of a product is computed from errors of the factors: ``Wq xq - W x =
    W (xq - x) + (Wq - W) x + (Wq - W)(xq - x)``. Rounding is then relative to the error, so
    that products in bfloat16 are accurate enough for any number of bits.

    :param x: tokens, shape (tokens, d), float32
    :param weight: shape (out, d), float32
    :param schemes: pairs of the quantization of weights and of activations; None for no
        quantization
    :param token_weights: shape (tokens,); None for equal weights
    :param product_dtype: dtype of the matrix products, float32 or bfloat16
    :return: SQNR with each scheme; inf where nothing is quantized, nan without a signal
    """
    keys = [(_key(weights), _key(inputs)) for weights, inputs in schemes]
    by_key = {_key(args): args for args in chain.from_iterable(schemes)}
    # tokens themselves under None, errors of quantized tokens under the scheme's key
    factors: dict[str | None, Tensor] = {None: x}
    factors |= {key: quantize_by_range(x, by_key[key]) - x for _, key in keys if key}

    exact = _products(factors, weight, product_dtype)
    signal = energy(exact[None], token_weights)
    noise: dict[tuple[str | None, str | None], float] = {
        (None, key): energy(exact[key], token_weights) for key in factors if key
    }
    for weight_key in {key for key, _ in keys if key}:
        error = quantize_by_range(weight, by_key[weight_key]) - weight
        # only errors of activations that share a scheme with this error of the weight
        partners = {key for other, key in keys if other == weight_key} | {None}
        chosen = {key: factor for key, factor in factors.items() if key in partners}
        products = _products(chosen, error, product_dtype)
        noise[weight_key, None] = energy(products[None], token_weights)
        for key in partners - {None}:
            joint = products[key] + products[None] + exact[key]
            noise[weight_key, key] = energy(joint, token_weights)

    def ratio(weight_key: str | None, input_key: str | None) -> float:
        if signal == 0:
            return math.nan
        energy_of_noise = noise.get((weight_key, input_key))
        return signal / energy_of_noise if energy_of_noise else math.inf

    return [SQNR(ratio(w, None), ratio(None, i), ratio(w, i)) for w, i in keys]


def _key(args: QuantizationArgs | None) -> str | None:
    return None if args is None else args.model_dump_json()


def _products(
    factors: Mapping[str | None, Tensor], weight: Tensor, dtype: torch.dtype
) -> dict[str | None, Tensor]:
    """Multiply tokens by a weight in one product; the result has the keys of the tokens"""
    tokens = torch.cat(list(factors.values())).to(dtype)
    products = tokens @ weight.to(dtype).T
    return dict(zip(factors, products.chunk(len(factors)), strict=True))
