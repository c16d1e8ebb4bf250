# SPDX-License-Identifier: Apache-2.0
"""Streaming second moments of an input: GPTQ's Hessian up to a factor, in blocks."""

import torch
import torch.distributed as dist
from torch import Tensor

from cat_modifier.functional.alignment import diagonal_blocks

__all__ = ["SecondMoments"]


class SecondMoments:
    """
    Running mean of the k x k diagonal blocks of ``x x^T``.

    The mean is accumulated, not the sum. A float32 sum over many tokens would lose small
    batches to rounding.

    :param in_features: d, size of a token's activation
    :param block_size: k, a divisor of d

    Attributes:
        mean: shape (d/k, k, k), float32, on the device of the first tokens
        count: number of tokens seen
    """

    def __init__(self, in_features: int, block_size: int):
        self.shape = (in_features // block_size, block_size, block_size)
        self.mean: Tensor | None = None
        self.count = 0

    def update(self, tokens: Tensor):
        """
        Add tokens.

        :param tokens: shape (tokens, d), any floating point dtype
        """
        count = tokens.shape[0]
        if count == 0:
            return
        batch = diagonal_blocks(tokens.float(), self.shape[-1]).div_(count)
        self.count += count
        if self.mean is None:
            self.mean = batch
        else:
            self.mean.lerp_(batch.to(self.mean.device), count / self.count)

    def reduce(self, device: torch.device):
        """
        Average over all ranks, weighted by their tokens. A collective call.

        :param device: device to compute on if this rank has seen no tokens
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        mean = torch.zeros(self.shape, device=device) if self.mean is None else self.mean
        # float64: counts are exact, and the order of the ranks does not matter
        total = mean.double() * self.count
        count = torch.tensor(float(self.count), dtype=torch.float64, device=mean.device)
        dist.all_reduce(total)
        dist.all_reduce(count)
        self.count = int(count.item())
        if self.count:
            self.mean = (total / count).float()
