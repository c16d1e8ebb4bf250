# SPDX-License-Identifier: Apache-2.0
"""What the kernels compute, in plain PyTorch"""

import torch
from torch import Tensor

from cat_modifier.mathematics.hadamard import apply_hadamard
from cat_modifier.mathematics.transform import apply_blocks

__all__ = ["integer_range", "quantize_per_token", "transform"]


def integer_range(num_bits: int) -> tuple[int, int]:
    """Least and greatest integer"""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1


def transform(
    x: Tensor, blocks: Tensor | None, hadamard: Tensor | None = None, stride: int = 1
) -> Tensor:
    """
    ``(H kron I) T x``, computed in the dtype of x.

    :param x: shape (..., d), floating point
    :param blocks: shape (d/k, k, k); None to leave them out
    :param hadamard: H, shape (p, p); None to leave it out
    :param stride: q, distance of the channels which it multiplies
    :return: shape and dtype of x
    """
    transformed = x if blocks is None else apply_blocks(x, blocks.to(x.dtype))
    if hadamard is not None:
        transformed = apply_hadamard(transformed, hadamard.to(x.dtype), stride)
    return transformed


def quantize_per_token(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Dynamic quantization with one scale a token, as compressed-tensors defines it: the
    range of a symmetric quantizer is divided by half the number of intervals (7.5 for 4
    bits), and zero is always representable.

    :param x: shape (tokens, ...), floating point
    :param clip_ratio: of the range to that of the values and zero, shape (), float32; None
        for 1. Of asymmetric ranges alone
    :return: codes, shape of x, int8; scales, shape (tokens, 1), float32; zero points, shape
        (tokens, 1), int32, or None if symmetric
    """
    q_min, q_max = integer_range(num_bits)
    channels = tuple(range(1, x.ndim))
    x = x.float()
    tiny = torch.finfo(torch.float32).tiny
    if symmetric:
        # this very expression: an ulp decides whether the largest value, at 7.5, rounds up
        largest = x.abs().amax(channels, keepdim=True)
        scale = (largest / ((q_max - q_min) / 2)).clamp_min(tiny)
        codes = (x / scale).round().clamp(q_min, q_max)
        return codes.to(torch.int8), scale.flatten(1), None
    low = x.amin(channels, keepdim=True).clamp_max(0)
    high = x.amax(channels, keepdim=True).clamp_min(0)
    if clip_ratio is not None:
        low, high = low * clip_ratio, high * clip_ratio
    scale = ((high - low) / (q_max - q_min)).clamp_min(tiny)
    zero_point = (q_min - low / scale).clamp(q_min, q_max).round()
    codes = (x / scale + zero_point).round().clamp(q_min, q_max)
    return codes.to(torch.int8), scale.flatten(1), zero_point.flatten(1).to(torch.int32)
