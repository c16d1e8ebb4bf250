# SPDX-License-Identifier: Apache-2.0
"""
Signal-to-quantization-noise ratio (SQNR) of a quantized Linear, and its factors: bit
width, concentration and alignment (arXiv 2603.04359, lemmas 2.1-2.3 and theorem 2.4).

A Linear is ``y = W x`` with ``W`` of shape (out, d). Where expectations over tokens are
taken, tokens are rows of a tensor, and ``token_weights`` say how much each counts (all the
same by default). All results are ratios of energies, without a unit; :func:`to_db` gives
``10 log10`` of a ratio.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

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
    :param joint: both are, ``Wq xq``
    """

    weights: float
    activations: float
    joint: float


def to_db(ratio: float) -> float:
    """``10 log10(ratio)``; -inf for a ratio of 0, nan for nan"""
    if math.isnan(ratio):
        return math.nan
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def energy(x: Tensor, token_weights: Tensor | None = None) -> float:
    """
    ``E||x||^2``

    :param x: shape (tokens, d)
    :param token_weights: shape (tokens,); they need not sum to 1
    """
    # at least float32: the squares of what overflows or vanishes in 16 bits
    dtype = torch.promote_types(x.dtype, torch.float32)
    energies = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).double().square()
    if token_weights is None:
        return energies.mean().item()
    return (energies @ token_weights / token_weights.sum()).item()


def range_ends(x: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """
    Ends of the range which a quantizer spans: ``-max|x_i|`` and ``max|x_i|`` if symmetric,
    else ``min(x, 0)`` and ``max(x, 0)``, over all values which share a scale.

    :param x: shape (rows, d); tokens, or rows of a weight
    :param args: `strategy` says what shares a scale: `token` and `channel` a row, `group`
        and `tensor_group` each `group_size` channels of a row, `block` a rectangle of a
        weight, `tensor` all; the last groups and blocks may be incomplete
    :return: each of shape (rows, d/g): one range for each g channels of each row; g is d if
        they share one
    :raises ValueError: if the strategy is of another kind
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
    Width of the range of values that a quantizer covers, zero included.

    :param x: shape (rows, d)
    :param args: see :func:`range_ends`
    :return: shape (rows, d/g)
    """
    low, high = range_ends(x, args)
    return high - low


def _tile(shape: torch.Size, args: QuantizationArgs) -> tuple[int, int]:
    """Rows and channels which share a scale"""
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
    raise ValueError(f"Ranges of strategy {strategy.value} are not those of a Linear")


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """With zeros, as compressed-tensors completes tiles: no range changes, 0 is in all"""
    rows, channels = x.shape
    return torch.nn.functional.pad(x, (0, -channels % width, 0, -rows % height))


def quantize_by_range(x: Tensor, args: QuantizationArgs, ratio: float | Tensor = 1.0) -> Tensor:
    """
    Round as compressed-tensors does, with the least and greatest value of each range as its
    ends, and scale back. This is how dynamic activations and weights of observer `minmax` are
    quantized; others have a part of these ranges, or more.

    :param x: shape (rows, d)
    :param args: quantization to integers, or floats of 4 or 8 bits; see :func:`range_ends`. A
        global scale, as `tensor_group` may have one, is taken of x
    :param ratio: range over the range of the values; broadcasts to (rows, d/g)
    :return: shape (rows, d), dtype of x
    """
    if x.numel() == 0:
        return x
    low, high = (end * ratio for end in range_ends(x, args))
    global_scale = None
    # compressed-tensors has none for scales which are found at run time alone
    if args.strategy == QuantizationStrategy.TENSOR_GROUP and args.dynamic is not True:
        global_scale = generate_gparam(low.min(), high.max())
    scale, zero_point = calculate_qparams(low, high, args, global_scale)
    # every range is a row of its own here: one scale a row is all that is asked of
    # compressed-tensors, whose strategies want scales of different shapes
    row = QuantizationArgs(
        num_bits=args.num_bits, type=args.type, symmetric=args.symmetric, strategy="channel"
    )
    _, width = _tile(x.shape, args)
    padded = _padded(x, 1, width)
    scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    rows = padded.reshape(-1, width)
    # of 16-bit values and a global scale in float32, it would be float32
    quantized = fake_quantize(rows, scale, zero_point, row, global_scale).to(x.dtype)
    return quantized.view(padded.shape)[:, : x.shape[-1]]


def concentration(
    x: Tensor,
    args: QuantizationArgs,
    row_weights: Tensor | None = None,
    noise_shares: Tensor | None = None,
) -> float:
    """
    How well values fill their range: ``C(x) = E||x||^2 / E[r(x)^2]`` of activations, and
    ``C(W) = sum_j ||w_j||^2 / sum_j r(w_j)^2`` of the rows of a weight [lemmas 2.2, 2.3].

    If a row has several ranges, noise of each meets only those channels of the other
    factor of the product. Their squares are then averaged with ``noise_shares``, so that
    :func:`predicted_sqnr` holds as it does for one range a row.

    :param x: tokens or rows of a weight, shape (rows, d), floating point
    :param args: see :func:`range_ends`
    :param row_weights: shape (rows,), for activations; None counts all rows the same
    :param noise_shares: share of the other factor's energy which each range of channels
        holds, shape (d/g,): of ``||W_g||^2`` for activations, of ``E||x_g||^2`` for
        weights; None if they are all the same
    :return: nan for zeros
    """
    squared = quantization_range(x, args).to(torch.float64).square()
    if noise_shares is None:
        squared = squared.mean(-1)
    else:
        shares = noise_shares.to(squared)
        squared = squared @ (shares / shares.sum())
    if row_weights is not None:
        squared = squared * (row_weights.to(squared) / row_weights.sum())
        mean = squared.sum().item()
    else:
        mean = squared.mean().item()
    return energy(x, row_weights) / mean if mean else math.nan


def alignment(output_energy: float, weight_energy: float, input_energy: float) -> float:
    """
    ``A(x, W) = E||W x||^2 / (||W||_F^2 E||x||^2)``, between 0 and 1.

    :param output_energy: ``E||W x||^2``, summed over the Linears of a group
    :param weight_energy: ``||W||_F^2``, summed over the Linears of a group
    :param input_energy: ``E||x||^2``
    :return: nan if the weight or the input is zero
    """
    product = weight_energy * input_energy
    return output_energy / product if product else math.nan


def achievable_alignment(output_energy: float, sx_root: Tensor, sw: Tensor) -> float:
    """
    Best alignment over all invertible transforms with the blocks of the second moments: all,
    if these are whole (k = d), else all block-diagonal ones with blocks of size k.

    ``A* = E||W x||^2 / (sum_i ||W_i Sx_ii^(1/2)||_*)^2`` with the nuclear norm ``||.||_*``
    and ``W_i`` the columns of block i: ``tr(Sw G^-1) tr(G Sx)`` sees only diagonal blocks of
    the moments, and is least at the solution of the Riccati equation (see
    :mod:`cat_modifier.functional.alignment`).

    :param output_energy: ``E||W x||^2``, summed over the Linears which share the transform
    :param sx_root: square roots of the diagonal blocks of Sx, which may serve several
        Linears: ``matrix_power(blocks, 0.5)``, shape (d/k, k, k), float64
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
    Theorem 2.4 for any two bit widths. Uniform rounding noise of energy ``r^2 / (12 N^2)``
    on each value, with ``N(b) = 2^b - 1`` intervals, gives ``12 N(b)^2 C A`` for weights and
    for activations [lemmas 2.2, 2.3]; both together, their parallel sum [lemma 2.1].

    :param weight_bits: bits of a weight; None if weights are not quantized
    :param activation_bits: the same of activations
    :return: inf where nothing is quantized; nan for zero weights or inputs
    """

    def ratio(bits: int | None, concentration: float) -> float:
        return math.inf if bits is None else 12 * (2**bits - 1) ** 2 * concentration * alignment

    weights = ratio(weight_bits, weight_concentration)
    activations = ratio(activation_bits, activation_concentration)
    return SQNR(weights, activations, parallel_sum(weights, activations))


def parallel_sum(a: float, b: float) -> float:
    """``a || b = 1 / (1/a + 1/b)``: the SQNR of two independent sources of noise"""
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
    Quantize for real, multiply, and compare with the exact product.

    Errors are taken before the products, ``Wq xq - W x = W (xq - x) + (Wq - W) x +
    (Wq - W)(xq - x)``, so that products in bfloat16 are accurate enough for any number of
    bits: their rounding is relative to the error.

    :param x: tokens, shape (tokens, d), float32
    :param weight: shape (out, d), float32
    :param schemes: quantization of weights and of activations; None leaves them as they are
    :param token_weights: shape (tokens,)
    :param product_dtype: dtype of the matrix products, float32 or bfloat16
    :return: one for each scheme; inf where nothing is quantized, nan without a signal
    """
    keys = [(_key(weights), _key(inputs)) for weights, inputs in schemes]
    by_key = {_key(args): args for args in chain.from_iterable(schemes)}
    # under None, what is not quantized: x itself
    factors: dict[str | None, Tensor] = {None: x}
    factors |= {key: quantize_by_range(x, by_key[key]) - x for _, key in keys if key}

    exact = _products(factors, weight, product_dtype)
    signal = energy(exact[None], token_weights)
    noise: dict[tuple[str | None, str | None], float] = {
        (None, key): energy(exact[key], token_weights) for key in factors if key
    }
    for weight_key in {key for key, _ in keys if key}:
        error = quantize_by_range(weight, by_key[weight_key]) - weight
        # of the errors of the activations, those which this error occurs together with
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
    """Products of tokens with a weight, all at once, by the keys of the tokens"""
    tokens = torch.cat(list(factors.values())).to(dtype)
    products = tokens @ weight.to(dtype).T
    return dict(zip(factors, products.chunk(len(factors)), strict=True))
