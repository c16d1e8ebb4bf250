# SPDX-License-Identifier: Apache-2.0
"""
Kernels for CPUs: ``transform_quantize.cpp`` for inputs of integer products, oneDNN for others.

Without a compiler, PyTorch computes what the first computes.
"""

from functools import cache

import torch
from torch import Tensor

from cat_modifier.functional.hadamard import without_twos
from cat_modifier.functional.stored import dequantize_blocks
from cat_modifier.kernels import native, reference

__all__ = ["quantize", "transform", "transform_quantize"]


def transform(
    x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, interleave: int
) -> Tensor:
    """
    Multiply tokens by the blocks, then by the Hadamard matrix.

    :param x: shape (tokens, d)
    :param blocks: T, shape (d/k, k, k), dtype of x, or int8 as stored; None for none
    :param hadamard: shape (p, p), dtype of x; None for none
    :param interleave: q, distance of the channels that ``hadamard`` multiplies
    :return: shape (tokens, d)
    """
    tokens, in_features = x.shape
    size = interleave if blocks is None else blocks.shape[-1]
    count = in_features // size
    z = x.view(tokens, count, size).transpose(0, 1)
    if blocks is not None:
        z = torch.bmm(z, dequantize_blocks(blocks, x.dtype).mT)
    if hadamard is None:
        return z.transpose(0, 1).reshape(x.shape)
    # one product for all tokens, instead of one product per token
    order = hadamard.shape[0]
    spans = in_features // (order * interleave)
    z = z.view(count, tokens, size // interleave, interleave).transpose(1, 2)
    z = hadamard @ z.reshape(spans, order, tokens * interleave)
    z = z.view(in_features // interleave, tokens, interleave).transpose(0, 1)
    return z.reshape(x.shape)


def transform_quantize(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None,
    interleave: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Transform as :func:`transform`, in float32, then quantize.

    A Hadamard matrix of a large order is multiplied by oneDNN, in the dtype of x.

    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`. The scale of a
        token with values that are not finite is NaN
    """
    if native.why_unavailable() is not None:
        x = x.float()
        if blocks is not None or hadamard is not None:
            blocks = None if blocks is None else dequantize_blocks(blocks, torch.float32)
            hadamard = None if hadamard is None else hadamard.float()
            x = transform(x, blocks, hadamard, interleave)
        q, scales, zero_points = reference.quantize_per_token(
            x, num_bits, symmetric, clip_ratio
        )
        is_finite = x.isfinite().all(1, keepdim=True)
        if zero_points is not None:
            zero_points = zero_points.where(is_finite, 0)
        return q.where(is_finite, 0), scales.where(is_finite, torch.nan), zero_points
    if hadamard is not None and _is_large(hadamard.shape[0]):
        x, blocks, hadamard = transform(x, blocks, hadamard, interleave), None, None
    q, scales, zero_points = torch.ops.cat_modifier.transform_quantize_cpu(
        x.contiguous(), blocks, hadamard, interleave, num_bits, symmetric, clip_ratio
    )
    return q, scales, None if symmetric else zero_points


@cache
def _is_large(order: int) -> bool:
    """Whether the C++ kernel, which factorizes the matrix in each call, would be slower"""
    return order > 256 or without_twos(order) > 64


def quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Quantize with one dynamic scale per token.

    :param x: shape (tokens, d)
    :return: see :func:`transform_quantize`
    """
    return transform_quantize(x, None, None, 1, num_bits, symmetric, clip_ratio)
