# SPDX-License-Identifier: Apache-2.0
"""The options of CATModifier that decide about transforms."""

from dataclasses import dataclass
from typing import Literal

import torch

from cat_modifier.functional.layout import Rotation

__all__ = ["OverheadUnit", "PlanOptions"]

OverheadUnit = Literal["multiply-adds", "bytes"]
"""What `max_overhead` limits: work for long prompts, or reads for each generated token"""


@dataclass(frozen=True)
class PlanOptions:
    """
    Options of CATModifier for transforms. See its docstring.

    :param precision: dtype of stored blocks; None for int8 where it holds T well, else bfloat16
    :param max_overhead: limit for the inputs that are planned together; None for no limit
    :param overhead_unit: unit of the limit
    """

    rotation: Rotation
    alignment_strength: float
    dampening_frac: float
    clip_activations: bool
    precision: torch.dtype | None
    max_overhead: float | None
    overhead_unit: OverheadUnit = "multiply-adds"
