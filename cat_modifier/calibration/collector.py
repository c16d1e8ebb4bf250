# SPDX-License-Identifier: Apache-2.0
"""Statistics of each shared input, collected during a forward pass."""

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Linear

from cat_modifier.calibration.second_moments import SecondMoments
from cat_modifier.calibration.shared_inputs import (
    SharedInput,
    SharedInputObserver,
    padding_mask,
)
from cat_modifier.calibration.token_sample import TokenSample

__all__ = ["InputCollector", "InputStatistics"]


class Statistics(Protocol):
    """Statistics of an input, updated with tokens of shape (tokens, d)"""

    def update(self, tokens: Tensor): ...


StatisticsType = TypeVar("StatisticsType", bound=Statistics)


class InputStatistics:
    """
    Second moments and a token sample of one input.

    :param in_features: d, size of a token's activation
    :param block_size: k, a divisor of d
    :param sample_size: number of tokens to keep
    :param seed: seed of the token sample
    """

    def __init__(self, in_features: int, block_size: int, sample_size: int, seed: int = 0):
        self.second_moments = SecondMoments(in_features, block_size)
        self.sample = TokenSample(sample_size, seed)

    def update(self, tokens: Tensor):
        """
        Add tokens.

        :param tokens: shape (tokens, d), any floating point dtype
        """
        self.second_moments.update(tokens)
        self.sample.update(tokens)

    def reduce(self, device: torch.device):
        """
        Merge the statistics of all ranks. A collective call.

        :param device: see :meth:`SecondMoments.reduce`
        """
        self.second_moments.reduce(device)
        self.sample.reduce()


class InputCollector(Generic[StatisticsType]):
    """
    Watches calls of Linears, and updates the statistics of their inputs.

    An input counts once, however many Linears read it. Padding does not count.

    :param linears: Linears by full name, in the order of the model
    :param new_statistics: makes the empty statistics of an input
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        new_statistics: Callable[[SharedInput], StatisticsType],
    ):
        self.observer = SharedInputObserver(linears)
        self._new_statistics = new_statistics
        self._masks: dict[int, Tensor] = {}
        self._certain: set[int] = set()
        self._weighted: set[str] = set()
        # by the Linear that was called first, which need not be the first in the model
        self._statistics: dict[str, StatisticsType] = {}

    def set_attention_mask(self, batch: int, attention_mask: object):
        """
        Note which tokens of a batch are padding.

        :param batch: index of the batch
        :param attention_mask: any form of mask; an unknown form is ignored
        """
        mask = padding_mask(attention_mask)
        if mask is None:
            return
        # trust the mask of the data (2 dimensions) over those that models derive from it
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            self._certain.add(batch)
        elif batch in self._certain:
            return
        self._masks[batch] = mask

    def attention_mask(self, batch: int) -> Tensor | None:
        """Return the mask of real tokens, shape (batch, tokens), bool; None if not known"""
        return self._masks.get(batch)

    def observe(self, name: str, x: Tensor, batch: int, weights: Tensor | None = None):
        """
        Record the call of a Linear. An input of weighted tokens takes no others.

        :param name: full name of the Linear
        :param x: its input, shape (..., d)
        :param batch: index of the batch
        :param weights: weights of the tokens, shape (...), float32; None for equal weights
        """
        shared, is_new = self.observer.observe(name, x)
        if not is_new or (weights is None and not self._weighted.isdisjoint(shared.linears)):
            return
        if weights is not None:
            self._weighted.add(name)
            x = x.float() * weights.sqrt().unsqueeze(-1)
        tokens = x.reshape(-1, x.shape[-1])
        # the mask does not fit other layouts, such as tokens routed to an expert
        mask = self._masks.get(batch)
        if mask is not None and mask.numel() == tokens.shape[0]:
            tokens = tokens[mask.flatten().to(tokens.device)]
        key = self._key(shared)
        if key is None:
            key = name
            self._statistics[key] = self._new_statistics(shared)
        self._statistics[key].update(tokens)

    def pending(self) -> list[SharedInput]:
        """List the inputs with statistics not taken yet, in the order of the model"""
        return [one for one in self.observer.inputs if self._key(one) is not None]

    def take(self, shared: SharedInput) -> StatisticsType:
        """Return and drop the statistics of a pending input; no other Linear may join it"""
        key = self._key(shared)
        if key is None:
            raise KeyError(shared.first)
        shared.is_closed = True
        return self._statistics.pop(key)

    def _key(self, shared: SharedInput) -> str | None:
        return next((name for name in shared.linears if name in self._statistics), None)
