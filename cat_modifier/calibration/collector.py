# SPDX-License-Identifier: Apache-2.0
"""Statistics of each shared input, collected during a forward pass."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Linear

from cat_modifier.calibration.padding import PaddingMasks, real_tokens
from cat_modifier.calibration.second_moments import SecondMoments
from cat_modifier.calibration.shared_inputs import SharedInput, SharedInputObserver
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

    Attributes:
        tokens_read: number of tokens that the Linears read, of which the statistics may have a
            part
    """

    def __init__(self, in_features: int, block_size: int, sample_size: int, seed: int = 0):
        self.second_moments = SecondMoments(in_features, block_size)
        self.sample = TokenSample(sample_size, seed)
        self.tokens_read = 0

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
    :param masks: masks of the batches, to be noted as modules are called
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        new_statistics: Callable[[SharedInput], StatisticsType],
        masks: PaddingMasks,
    ):
        self.observer = SharedInputObserver(linears)
        self._new_statistics = new_statistics
        self.masks = masks
        self._tokens_read: Counter[str] = Counter()
        self._weighted: set[str] = set()
        # by the Linear that was called first, which need not be the first in the model
        self._statistics: dict[str, StatisticsType] = {}

    def count(self, name: str, x: Tensor, batch: int):
        """
        Count the tokens that a Linear reads, be they observed or not.

        :param name: full name of the Linear
        :param x: its input, shape (..., d)
        :param batch: index of the batch
        """
        self._tokens_read[name] += self.masks.count(name, batch, x)

    def tokens_read(self, shared: SharedInput) -> int:
        """Number of tokens that the Linears of an input were called with"""
        return max(self._tokens_read[name] for name in shared.linears)

    def observe(self, name: str, x: Tensor, batch: int, weights: Tensor | None = None):
        """
        Record the call of a Linear. An input of weighted tokens takes no others.

        :param name: full name of the Linear
        :param x: its input, shape (..., d)
        :param batch: index of the batch
        :param weights: weights of the tokens, shape (...), float32; None for equal weights
        """
        shared, is_new = self.observer.observe(name, x)
        mask = self.masks.of(name, batch, x)
        if not is_new or (weights is None and not self._weighted.isdisjoint(shared.linears)):
            return
        if weights is not None:
            self._weighted.add(name)
            x = x.float() * weights.sqrt().unsqueeze(-1)
        tokens = real_tokens(x, mask)
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
