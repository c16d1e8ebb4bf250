# SPDX-License-Identifier: Apache-2.0
"""Weights of a group of Linears, and of the Linear that its transform is folded into"""

import torch
from compressed_tensors.utils import align_module_device
from torch import Tensor
from torch.nn import Linear

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.calibration.shared_inputs import SharedInput

__all__ = ["fold_into_values", "read_weights"]


def read_weights(group: SharedInput, device: torch.device) -> dict[str, Tensor]:
    """By name, float64"""
    weights = {}
    for name, linear in group.linears.items():
        with align_module_device(linear):
            weights[name] = linear.weight.detach().to(device, torch.float64)
    return weights


def fold_into_values(linear: Linear, heads: ValueProjection, blocks: Tensor) -> dict[str, Tensor]:
    """
    :param linear: which makes the values
    :param heads: which it makes
    :param blocks: of the transform, one for each head of attention, shape (d/k, k, k),
        float64; those of heads that share a head of values are the same
    :return: weight, and bias if there is one, with the transform in its rows
    """
    blocks, folded = blocks[:: heads.repeats], {}
    with align_module_device(linear):
        for name in ("weight", "bias"):
            parameter = getattr(linear, name)
            if parameter is None:
                continue
            rows = parameter.detach().to(blocks).unflatten(0, (-1, heads.head_dim))
            transformed = torch.einsum("hij,hj...->hi...", blocks, rows).flatten(0, 1)
            folded[name] = transformed.to(parameter.dtype)
    return folded
