# SPDX-License-Identifier: Apache-2.0
"""
Blocks of a transform as they are stored: in floating point, or as int8 in steps of 1/1024.

Rounding T does not change the function of a model: its inverse is that of T as stored. Only
alignment is a little less than it could be. And T may have any scale, since the inverse undoes
it: integers need none.
"""

import torch
from torch import Tensor

__all__ = ["STEP", "dequantize_blocks", "fits_int8", "store_blocks"]

STEP = 2**-10
"""
T of an entry of 1 in int8. A power of two: 16-bit floats hold T exactly. Tokens become at most
about as large as they are: rows of a block of 64 channels have norms of 1 at most
"""

_LARGEST_NOISE = 0.01
"""
Largest energy that rounding of T may add to a transformed token, relative to the token's. The
alignment of T is a maximum, so that the loss is about as much, 0.04 dB
"""


def store_blocks(blocks: Tensor, stored: Tensor):
    """
    Round blocks to the dtype of a tensor. int8 scales them, so that the largest entry is 127.

    :param blocks: T, shape (d/k, k, k), float64
    :param stored: receives the blocks, same shape, floating point or int8
    """
    if stored.dtype == torch.int8:
        largest = blocks.abs().amax().clamp_min(torch.finfo(blocks.dtype).tiny)
        blocks = (blocks * (127 / largest)).round()
    stored.copy_(blocks)


def dequantize_blocks(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Compute T of blocks as stored.

    :param stored: shape (d/k, k, k), floating point or int8
    :param dtype: floating point
    :return: shape (d/k, k, k), ``dtype``; exact for int8
    """
    blocks = stored.to(dtype)
    return blocks * STEP if stored.dtype == torch.int8 else blocks


def fits_int8(blocks: Tensor) -> bool:
    """
    Tell whether int8 holds each block of T well: not where channels of the input, or directions
    among them, differ much in size.

    With the error E of rounding, a token z = T x becomes z + E T^-1 z.

    :param blocks: T, shape (d/k, k, k), float64, finite
    """
    stored = torch.empty_like(blocks, dtype=torch.int8)
    store_blocks(blocks, stored)
    error = stored.to(blocks.dtype) / 127 * blocks.abs().amax() - blocks
    noise = error @ torch.linalg.inv_ex(blocks)[0]
    mean_energy = noise.square().sum((1, 2)) / blocks.shape[-1]
    return bool((mean_energy <= _LARGEST_NOISE).all())  # not for NaN
