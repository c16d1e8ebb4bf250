# SPDX-License-Identifier: Apache-2.0
"""
Clipping of activations: a token's range is made a little smaller than its values.

The largest of d values grows with d, while most stay where they are: a smaller range rounds
all values finer, and cuts a few of them off. What a dynamic quantizer finds as the range of a
clipped token is the range it was clipped to.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from cat_modifier.functional.sqnr import energy, quantize_by_range

__all__ = ["best_clip_ratio", "clip_tokens"]

_RATIOS = tuple(percent / 100 for percent in range(100, 58, -2))


def clip_tokens(x: Tensor, ratio: float | Tensor) -> Tensor:
    """
    :param x: shape (..., d)
    :param ratio: of the range of each token to that of its values and zero
    :return: shape and dtype of x
    """
    low = x.amin(-1, keepdim=True).clamp_max(0) * ratio
    high = x.amax(-1, keepdim=True).clamp_min(0) * ratio
    return torch.clamp(x, low, high)


def best_clip_ratio(
    x: Tensor, args: QuantizationArgs, token_weights: Tensor | None = None
) -> float:
    """
    :param x: sample of tokens, shape (tokens, d), floating point
    :param args: of asymmetric integers with a scale for each token
    :param token_weights: how much each counts, shape (tokens,)
    :return: the ratio of the least error, of energies summed over all tokens
    """

    def error(ratio: float) -> float:
        return energy(quantize_by_range(clip_tokens(x, ratio), args) - x, token_weights)

    return min(_RATIOS, key=error)
