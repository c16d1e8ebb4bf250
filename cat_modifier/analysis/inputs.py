# SPDX-License-Identifier: Apache-2.0
"""Knowledge of one input and of the weights that read it, from which transforms are made."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cat_modifier.calibration.collector import InputStatistics
from cat_modifier.functional.alignment import (
    DEFAULT_DAMPENING_FRAC,
    alignment_transform,
    diagonal_blocks,
    inner_blocks,
)

__all__ = ["AnalysisStatistics", "AnalyzedInput"]


class AnalysisStatistics(InputStatistics):
    """
    Second moments, a token sample and the channel maxima of one input.

    Attributes:
        maxima: ``max|x_i|`` of each channel, shape (d,); None before the first token
    """

    maxima: Tensor | None = None

    def update(self, tokens: Tensor):
        """
        :param tokens: shape (tokens, d), any floating point dtype
        """
        if tokens.shape[0] == 0:
            return
        super().update(tokens)
        maxima = tokens.abs().amax(0)
        self.maxima = maxima if self.maxima is None else maxima.maximum(self.maxima.to(maxima))


class AnalyzedInput:
    """
    One input and its readers.

    :param name: name of the first Linear, for messages
    :param statistics: statistics of the input
    :param block_size: k of CAT
    :param weights: weights by name of the Linear, each of shape (out, d), float32
    """

    def __init__(
        self,
        name: str,
        statistics: AnalysisStatistics,
        block_size: int,
        weights: Mapping[str, Tensor],
    ):
        self.name, self.statistics = name, statistics
        self.block_size, self.weights = block_size, weights
        first = next(iter(weights.values()))
        self.in_features, self.device = first.shape[1], first.device
        # size of the largest known blocks of Sx: k, or d if all of Sx is known
        self.known_size = statistics.second_moments.mean.shape[-1]
        self._weight_moments: dict[int, dict[str, Tensor]] = {}
        self._alignments: dict[int, Tensor] = {}

    def input_moments(self, block_size: int) -> Tensor:
        """
        :param block_size: divisor of `known_size`
        :return: diagonal blocks of Sx, shape (d/k, k, k), float64
        """
        blocks = inner_blocks(self.statistics.second_moments.mean, block_size)
        return blocks.to(self.device, torch.float64)

    def weight_moments(self, block_size: int) -> dict[str, Tensor]:
        """
        :param block_size: k, a divisor of d
        :return: diagonal blocks of ``W^T W`` of each Linear, shape (d/k, k, k), float64
        """
        if block_size not in self._weight_moments:
            self._weight_moments[block_size] = {
                name: diagonal_blocks(weight, block_size).double()
                for name, weight in self.weights.items()
            }
        return self._weight_moments[block_size]

    def alignment_transform(self, block_size: int) -> Tensor:
        """
        :param block_size: divisor of `known_size`
        :return: M, computed once for all rotations, shape (d/k, k, k), float64
        """
        if block_size not in self._alignments:
            self._alignments[block_size] = alignment_transform(
                self.input_moments(block_size),
                sum(self.weight_moments(block_size).values()),
                alignment_strength=1.0,
                dampening_frac=DEFAULT_DAMPENING_FRAC,
            )
        return self._alignments[block_size]
