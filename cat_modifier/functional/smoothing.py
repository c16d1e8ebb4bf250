# SPDX-License-Identifier: Apache-2.0
"""The channel scales of SmoothQuant (arXiv 2211.10438), to compare with."""

import torch
from torch import Tensor

__all__ = ["smoothing_scales"]


def smoothing_scales(input_maxima: Tensor, weight_maxima: Tensor) -> Tensor:
    """
    Compute ``s_i = sqrt(max|x_i| / max|w_i|)`` [equation 4, with its default strength 0.5].

    Inputs are divided by the scales, weights multiplied.

    :param input_maxima: ``max|x_i|`` of each channel over tokens, shape (d,), float64
    :param weight_maxima: ``max|w_i|`` of each channel over the rows of all weights, shape (d,),
        float64
    :return: shape (d,), float64; 1 for a channel that is zero in all tokens or in all weights
    """
    floor = torch.finfo(torch.float32).tiny
    alive = (input_maxima > floor) & (weight_maxima > floor)
    return torch.where(alive, (input_maxima / weight_maxima.clamp_min(floor)).sqrt(), 1.0)
