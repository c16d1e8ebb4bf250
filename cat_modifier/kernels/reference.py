# SPDX-License-Identifier: Apache-2.0
"""
The quantization that the kernels compute, in plain PyTorch.

The transform before it is :func:`cat_modifier.functional.transform.apply_transform`.
"""

import torch
from torch import Tensor

__all__ = ["quantize_per_token"]


def quantize_per_token(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Quantize dynamically, one scale per token, exactly as compressed-tensors does.

    A symmetric scale is the largest magnitude over half the number of intervals (7.5 for 4
    bits). Zero is always representable.

    :param x: shape (tokens, ...), floating point
    :param num_bits: bits of an integer, at most 8
    :param symmetric: whether there are no zero points
    :param clip_ratio: clipped range, relative to the range of the values and zero, shape (),
        float32; None does not clip. Asymmetric integers only
    :return: q, shape of x, int8; scales, shape (tokens, 1), float32; zero points, shape
        (tokens, 1), int32, or None if symmetric
    """
    q_min, q_max = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    channels = tuple(range(1, x.ndim))
    x = x.float()
    tiny = torch.finfo(torch.float32).tiny
    if symmetric:
        # same expression as compressed-tensors: the largest value is at 7.5, so that the last
        # bit decides where it rounds to
        largest = x.abs().amax(channels, keepdim=True)
        scale = (largest / ((q_max - q_min) / 2)).clamp_min(tiny)
        q = (x / scale).round().clamp(q_min, q_max)
        return q.to(torch.int8), scale.flatten(1), None
    low = x.amin(channels, keepdim=True).clamp_max(0)
    high = x.amax(channels, keepdim=True).clamp_min(0)
    if clip_ratio is not None:
        low, high = low * clip_ratio, high * clip_ratio
    scale = ((high - low) / (q_max - q_min)).clamp_min(tiny)
    zero_point = (q_min - low / scale).clamp(q_min, q_max).round()
    q = (x / scale + zero_point).round().clamp(q_min, q_max)
    return q.to(torch.int8), scale.flatten(1), zero_point.flatten(1).to(torch.int32)
