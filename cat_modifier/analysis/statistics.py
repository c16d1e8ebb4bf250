# SPDX-License-Identifier: Apache-2.0
"""What the analysis learns of an input in the calibration pass"""

from typing import Any

from torch import Tensor

from cat_modifier.calibration.second_moments import InputStatistics

__all__ = ["AnalysisStatistics"]


class AnalysisStatistics(InputStatistics):
    """
    Second moments, maxima of channels and a sample of one input.

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

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"maxima": self.maxima}

    def load_state_dict(self, state: dict[str, Any]):
        super().load_state_dict(state)
        self.maxima = state["maxima"]
