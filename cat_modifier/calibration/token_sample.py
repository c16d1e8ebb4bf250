# SPDX-License-Identifier: Apache-2.0
"""A small sample of the tokens of an input."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["TokenSample"]


class TokenSample:
    """
    Random sample without replacement, with a weight per token. Prefers tokens of high energy.

    Quantization noise and signal grow with a token's energy ``||x||^2``. A few tokens, such
    as the first of a text, can hold most of the energy. A uniform sample would miss them, or
    count them far too often.

    The method is priority sampling with the energy as the priority (Duffield, Lund, Thorup,
    "Priority sampling for estimation of arbitrary subset sums", 2007). For any ``f``, the
    weighted sum of ``f`` over the sample is an unbiased estimate of the mean of ``f`` over
    all tokens of positive energy.

    :param size: number of tokens to keep
    :param seed: seed of the sample; ranks need different ones

    Attributes:
        count: number of tokens seen
        tokens: shape (n, d), float32, n at most `size`; None before the first token
        weights: shape (n,), float64
    """

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)
        # keeps one more: the largest priority left out of the sample sets the weights
        self._priorities = torch.empty(0, dtype=torch.float64)
        self._candidates: Tensor | None = None

    @property
    def tokens(self) -> Tensor | None:
        return None if self._candidates is None else self._candidates[: self.size]

    @property
    def weights(self) -> Tensor:
        if self._candidates is None:
            return self._priorities
        threshold = self._priorities[self.size :].sum()
        energy = self._candidates[: self.size].double().square().sum(-1).cpu()
        return torch.where(energy > 0, energy.clamp_min(threshold) / energy, 0) / self.count

    def update(self, tokens: Tensor):
        """
        Draw from more tokens.

        :param tokens: shape (tokens, d), any floating point dtype
        """
        if tokens.shape[0] == 0:
            return
        self.count += tokens.shape[0]
        uniform = torch.rand(tokens.shape[0], generator=self._generator, dtype=torch.float64)
        norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32).double().cpu()
        priorities = norm.square() / (1 - uniform)
        if len(self._priorities) > self.size:
            # after the first batches few tokens get in. Tokens that are not finite always do:
            # checks must see them
            index = (~(priorities <= self._priorities.min())).nonzero().squeeze(1)
            if not len(index):
                return
            priorities, tokens = priorities[index], tokens[index.to(tokens.device)]
        self._keep(priorities, tokens.float())

    def reduce(self):
        """
        Merge the samples of all ranks. Each rank then has the same sample of all tokens. A
        collective call.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        candidates = None if self._candidates is None else self._candidates.cpu()
        of_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (self.count, self._priorities, candidates))
        device = None if self._candidates is None else self._candidates.device
        self.count = sum(count for count, _, _ in of_ranks)
        self._priorities, self._candidates = self._priorities[:0], None
        for _, priorities, tokens in of_ranks:
            if tokens is not None:
                self._keep(priorities, tokens.to(device or tokens.device))

    def _keep(self, priorities: Tensor, tokens: Tensor):
        """
        Add candidates, and keep those with the largest priorities.

        :param priorities: shape (n,), float64, on the CPU
        :param tokens: shape (n, d), float32
        """
        if self._candidates is not None:
            priorities = torch.cat([self._priorities, priorities])
            tokens = torch.cat([self._candidates.to(tokens.device), tokens])
        self._priorities, index = priorities.topk(min(self.size + 1, priorities.numel()))
        self._candidates = tokens[index.to(tokens.device)]
