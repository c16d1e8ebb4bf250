# SPDX-License-Identifier: Apache-2.0
"""What the kernels compute, in plain PyTorch"""

import torch
from torch import Tensor


__all__ = ["integer_range", "quantize_per_token"]


def integer_range(num_bits: int) -> tuple[int, int]:
    """Least and greatest integer"""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1


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
