# SPDX-License-Identifier: Apache-2.0
"""The layout of 4-bit weights that ``torch.ops.cat_modifier.packed_product`` reads."""

from contextlib import suppress
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["pack"]

_ROWS, _INPUTS = 32, 8
"""Channels of a panel, input channels of a line: see packed_product.cpp"""

_LARGE_PAGE = 2**21
"""Bytes"""


def pack(weight: Tensor) -> Tensor:
    """
    Pack weights in the order in which the product reads them.

    :param weight: shape (out, in), int8, values of 4 bits
    :return: shape (ceil(out / 32), ceil(in / 8), 128), uint8
    """
    rows, inputs = weight.shape
    codes = pad(weight + 8, (0, -inputs % _INPUTS, 0, -rows % _ROWS), value=8)
    panels = codes.view(torch.uint8).unflatten(0, (-1, _ROWS)).unflatten(2, (-1, 2, 4))
    low, high = panels.permute(3, 0, 2, 1, 4).flatten(3)
    return _in_large_pages(low | (high << 4))


def _in_large_pages(tensor: Tensor) -> Tensor:
    """Copy a tensor to large pages, if the system has them: they are read a fifth faster"""
    if tensor.numel() < _LARGE_PAGE:
        return tensor
    memory = mmap(-1, tensor.numel(), MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
