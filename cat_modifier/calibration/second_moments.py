# SPDX-License-Identifier: Apache-2.0
"""Streaming second moments of activations, and a sample of the activations themselves."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cat_modifier.functional.alignment import diagonal_blocks

__all__ = ["SecondMoments", "InputStatistics", "TokenSample"]


class SecondMoments:
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

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]):
        self.mean, self.count = state["mean"], state["count"]

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
    A few tokens which stand for all: a random sample without replacement that prefers
    tokens of high energy, with a weight for each.

    Quantization noise and signal grow with a token's energy ``||x||^2``, and a few tokens
    (the first of a text above all) can hold most of it. A uniform sample would miss them
    or count them far too often. This is priority sampling with the energy as the priority
    (Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums",
    2007): for any ``f``, the weighted sum of ``f`` over the sample is an unbiased estimate
    of its mean over all tokens of positive energy.

    :param size: tokens to keep
    :param seed: seed of the sample, for reproducibility

    Attributes:
        count: tokens seen
        tokens: shape (n, d), float32, n at most `size`; None before the first token
        weights: shape (n,), float64
    """

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)
        # one more than asked for: the largest priority left out sets the weights
        self._priorities = torch.empty(0, dtype=torch.float64)
        self._candidates: Tensor | None = None

    @property
    def tokens(self) -> Tensor | None:
        return None if self._candidates is None else self._candidates[: self.size]

    @property
    def weights(self) -> Tensor:
        threshold = self._priorities[self.size :].sum()
        energy = self.tokens.double().square().sum(-1).cpu()
        return torch.where(energy > 0, energy.clamp_min(threshold) / energy, 0) / self.count

    def update(self, tokens: Tensor):
        """
        :param tokens: shape (tokens, d), any floating point dtype
        """
        if tokens.shape[0] == 0:
            return
        self.count += tokens.shape[0]
        uniform = torch.rand(tokens.shape[0], generator=self._generator, dtype=torch.float64)
        norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32).double().cpu()
        priorities = norm.square() / (1 - uniform)
        if len(self._priorities) > self.size:
            # those which can get in, few after the first batches; and all that are not finite,
            # which somebody has to see
            index = (~(priorities <= self._priorities.min())).nonzero().squeeze(1)
            if not len(index):
                return
            priorities, tokens = priorities[index], tokens[index.to(tokens.device)]
        if self._candidates is not None:
            priorities = torch.cat([self._priorities, priorities])
            tokens = torch.cat([self._candidates.to(tokens.device), tokens.float()])
        self._priorities, index = priorities.topk(min(self.size + 1, priorities.numel()))
        self._candidates = tokens[index.to(tokens.device)].float()

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "priorities": self._priorities,
            "candidates": self._candidates,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]):
        self.count = state["count"]
        self._priorities, self._candidates = state["priorities"], state["candidates"]
        self._generator.set_state(state["generator"])


class InputStatistics:
    """
    Second moments and a sample of one input.

    :param features: d, size of a token's activation
    :param block_size: k, a divisor of d
    :param sample_size: tokens to keep
    """

    def __init__(self, features: int, block_size: int, sample_size: int):
        self.moments = SecondMoments(features, block_size)
        self.sample = TokenSample(sample_size)

    def update(self, tokens: Tensor):
        """
        :param tokens: shape (tokens, d), any floating point dtype
        """
        self.moments.update(tokens)
        self.sample.update(tokens)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict(), "sample": self.sample.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        self.moments.load_state_dict(state["moments"])
        self.sample.load_state_dict(state["sample"])
