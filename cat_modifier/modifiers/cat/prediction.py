# SPDX-License-Identifier: Apache-2.0
"""The SQNR that a transform is predicted to give (arXiv 2603.04359, theorem 2.4)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_modifier.functional.sqnr import alignment, concentration, energy, predicted_sqnr
from cat_modifier.functional.transform import FusedTransform
from cat_modifier.modifiers.cat.input_to_plan import ASSUMED, InputToPlan

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """
    Predicted SQNR and alignment of all Linears of an input together.

    Theorem 2.4, without clipping. Ratios of energies, without a unit.
    """

    sqnr: float
    alignment: float

    @property
    def noise(self) -> float:
        """Noise-to-signal ratio; 0 if nothing is quantized or there is no signal"""
        return 1 / self.sqnr if self.sqnr > 0 else 0.0


def predict(
    one: InputToPlan, weights: Mapping[str, Tensor], transforms: Sequence[FusedTransform]
) -> tuple[Prediction | None, list[Prediction | None]]:
    """
    Predict SQNR and alignment, on the token sample of an input.

    :param weights: weights by the name of the Linear, shape (out, d), float64; read one at a
        time
    :param transforms: transforms of the input
    :return: without a transform, and with each transform; None if no token was seen
    """
    if one.tokens is None:
        return None, [None] * len(transforms)
    tokens = one.tokens.to(torch.float64)
    before = _PredictionSums(one, tokens)
    after = [
        _PredictionSums(one, transform.transform_tokens(tokens)) for transform in transforms
    ]
    for name in one.names:
        weight = weights[name]
        before.add(weight)
        for sums, transform in zip(after, transforms, strict=True):
            sums.add(transform.transform_weight(weight))
    return before.result(), [sums.result() for sums in after]


class _PredictionSums:
    """
    Sums over the Linears of an input. Linears are added one at a time.

    :param tokens: sample of the input, transformed, shape (n, d), float64
    """

    def __init__(self, one: InputToPlan, tokens: Tensor):
        self._one, self._tokens = one, tokens
        self._weight_energy = self._output_energy = self._squared_ranges = 0.0

    def add(self, weight: Tensor):
        """
        Add a Linear.

        :param weight: shape (out, d), float64
        """
        weight_energy = weight.square().sum().item()
        self._weight_energy += weight_energy
        self._output_energy += energy(self._tokens @ weight.T, self._one.token_weights)
        # the squared ranges of all Linears add up, like their energies
        if weight_energy:
            args = self._one.weight_args or ASSUMED
            self._squared_ranges += weight_energy / concentration(weight, args)

    def result(self) -> Prediction:
        """Predict SQNR and alignment of all Linears together"""
        one, tokens = self._one, self._tokens
        aligned = alignment(
            self._output_energy, self._weight_energy, energy(tokens, one.token_weights)
        )
        ranges = self._squared_ranges
        sqnr = predicted_sqnr(
            one.weight_args and one.weight_args.num_bits,
            one.activation_args and one.activation_args.num_bits,
            self._weight_energy / ranges if ranges else math.nan,
            concentration(tokens, one.activation_args or ASSUMED, one.token_weights),
            aligned,
        )
        return Prediction(sqnr.joint, aligned)
