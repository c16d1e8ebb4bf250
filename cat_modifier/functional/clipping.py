# SPDX-License-Identifier: Apache-2.0
"""
Clipping of activations to a part of each token's range.

The largest of d values grows with d, while most values do not. A smaller range rounds most
values more finely, and clips only a few. The quantizer needs no change: it computes the range
of each token from the clipped values.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from cat_modifier.functional.sqnr import energy, quantize_by_range

__all__ = ["best_clip_ratio", "clip_tokens"]

_RATIOS = tuple(percent / 100 for percent in range(100, 58, -2))


def clip_tokens(x: Tensor, ratio: float | Tensor) -> Tensor:
    """
    Clip each token to a part of its range.

    :param x: shape (..., d)
    :param ratio: clipped range over the range of the token's values and zero
    :return: shape and dtype of x
    """
    low = x.amin(-1, keepdim=True).clamp_max(0) * ratio
    high = x.amax(-1, keepdim=True).clamp_min(0) * ratio
    return torch.clamp(x, low, high)


def best_clip_ratio(
    x: Tensor, args: QuantizationArgs, token_weights: Tensor | None = None
) -> float:
    """
    Find the ratio of least quantization error, summed over all tokens.

    :param x: sample of tokens, shape (tokens, d), floating point
    :param args: quantization to asymmetric integers with a scale for each token
    :param token_weights: weight of each token, shape (tokens,); None for equal ones
    :return: ratio in [0.6, 1]
    """

    def error(ratio: float) -> float:
        return energy(quantize_by_range(clip_tokens(x, ratio), args) - x, token_weights)

    return min(_RATIOS, key=error)
