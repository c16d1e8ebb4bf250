# SPDX-License-Identifier: Apache-2.0
"""Streaming second moments of activations, and a sample of the activations themselves."""

import torch
import torch.distributed as dist
from torch import Tensor

from cat_modifier.mathematics.transform import diagonal_blocks

__all__ = ["BlockMoments", "TokenSample"]


class BlockMoments:
    """
    Running mean of the k x k diagonal blocks of ``x x^T``.

    The mean, and not the sum, is accumulated: its float32 rounding error stays near that
    of one batch over any number of tokens, where a sum would lose small batches.

    :param features: d, size of a token's activation
    :param block_size: k, a divisor of d

    Attributes:
        mean: shape (d/k, k, k), float32, on the device of the first tokens
        count: tokens seen
    """

    def __init__(self, features: int, block_size: int):
        self.shape = (features // block_size, block_size, block_size)
        self.mean: Tensor | None = None
        self.count = 0

    def update(self, tokens: Tensor):
        """
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
        Weighted mean over all ranks, if there are several: the moments are then those of
        one process which had seen all tokens. A collective call.
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


class TokenSample:
    """
    A uniform random sample of the tokens seen, without replacement, for the statistics
    which second moments do not hold (ranges, and thus concentration).

    :param size: tokens to keep
    :param seed: seed of the sample, for reproducibility
    """

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self.tokens: Tensor | None = None

    def update(self, tokens: Tensor):
        """
        :param tokens: shape (tokens, d)
        """
        # each token draws a key once; the largest keys over all batches stay
        keys = torch.rand(tokens.shape[0], generator=self._generator)
        keys, index = keys.topk(min(self.size, keys.numel()))
        tokens = tokens[index.to(tokens.device)].float()
        if self.tokens is not None:
            keys = torch.cat([self._keys, keys])
            tokens = torch.cat([self.tokens, tokens])
            keys, index = keys.topk(min(self.size, keys.numel()))
            tokens = tokens[index.to(tokens.device)]
        self._keys, self.tokens = keys, tokens
