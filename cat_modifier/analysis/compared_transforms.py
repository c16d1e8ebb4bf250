# SPDX-License-Identifier: Apache-2.0
"""
The transforms that the analysis compares.

To add one, add it to ``TRANSFORMS``: a label, a function from what is known of an input to
the transform before the Linears that read it, and the options of CATModifier that make it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cat_modifier.calibration.collector import InputStatistics
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.alignment import DEFAULT_DAMPENING_FRAC as DAMPENING
from cat_modifier.functional.alignment import diagonal_blocks, inner_blocks
from cat_modifier.functional.layout import Rotation, choose_layout
from cat_modifier.functional.smoothing import smoothing_scales
from cat_modifier.functional.transform import (
    FusedTransform,
    StoredTransform,
    compute_blocks,
    store_transform,
)

__all__ = ["TRANSFORMS", "WHOLE", "AnalysisStatistics", "AnalyzedInput"]

WHOLE = "cat-full"  # needs all of Sx, not only its diagonal blocks
_PRECISION, _ALTERNATIVE = torch.int8, torch.bfloat16  # CATModifier's default, `auto`


class AnalysisStatistics(InputStatistics):
    """Second moments, token sample and channel maxima ``max|x_i|`` of one input"""

    maxima: Tensor | None = None

    def update(self, tokens: Tensor):
        if tokens.shape[0]:
            super().update(tokens)
            maxima = tokens.abs().amax(0)
            known = maxima if self.maxima is None else self.maxima.to(maxima)
            self.maxima = maxima.maximum(known)


@dataclass
class AnalyzedInput:
    """
    One input: its statistics, and the weights of its Linears.

    :param shared: input and the Linears that read it
    :param second_moments: known diagonal blocks of Sx, of size k, or d if all of Sx is known
    :param maxima: ``max|x_i|`` of each channel, shape (d,)
    :param block_size: k of CAT
    :param weights: weights by the name of the Linear, each of shape (out, d), float32
    """

    shared: SharedInput
    second_moments: Tensor
    maxima: Tensor
    block_size: int
    weights: Mapping[str, Tensor]
    _sw: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def sx(self, block_size: int) -> Tensor:
        """
        Compute the diagonal blocks of Sx, shape (d/k, k, k), float64.

        :param block_size: k, a divisor of the size of the known blocks
        """
        blocks = inner_blocks(self.second_moments, block_size)
        return blocks.to(self.weights[self.shared.first].device, torch.float64)

    def sw(self, block_size: int) -> dict[str, Tensor]:
        """Compute the diagonal blocks of ``W^T W`` of each Linear, (d/k, k, k), float64"""
        if block_size not in self._sw:
            self._sw[block_size] = {
                name: diagonal_blocks(weight, block_size).double()
                for name, weight in self.weights.items()
            }
        return self._sw[block_size]


class Transform(NamedTuple):
    """
    A transform that is compared with others.

    :param label: name in figures
    :param compute: makes the transform of one input
    :param options: options of CATModifier that make it; empty if nothing is to be made, None
        if CATModifier cannot make it
    """

    label: str
    compute: Callable[[AnalyzedInput], FusedTransform]
    options: dict[str, Any] | None = None


def _cat(
    rotation: Rotation, block_size: int | Literal["full"] | None = None, strength: float = 1.0
) -> Callable[[AnalyzedInput], FusedTransform]:
    """
    Make the function that computes CAT, or a part of it.

    :param block_size: k; None for the block size of the analysis
    :param strength: exponent of the alignment transform; 0 for the rotation alone
    """

    def compute(data: AnalyzedInput) -> FusedTransform:
        name, in_features = data.shared.first, data.shared.in_features
        # second moments are known only for blocks that divide the known ones
        known, bound = data.second_moments.shape[-1], block_size or data.block_size
        bound = choose_layout(name, known, 1, bound, rotation).block_size
        layout = choose_layout(name, in_features, 1, bound, rotation)
        sx = data.sx(layout.block_size)
        sw = sum(data.sw(layout.block_size).values(), torch.zeros_like(sx))
        size = layout.stored_size
        stored = torch.empty(
            in_features // size, size, size, dtype=_PRECISION, device=sx.device
        )
        blocks = compute_blocks(
            sx, sw, rotation, layout.fused_hadamard_size, strength, DAMPENING
        )
        return store_transform(blocks, layout, stored, _ALTERNATIVE).invert()

    return compute


def _smooth_scaling(data: AnalyzedInput) -> FusedTransform:
    """Divide each channel by its scale of SmoothQuant"""
    weights = torch.stack([w.abs().amax(0) for w in data.weights.values()]).amax(0).double()
    scales = smoothing_scales(data.maxima.to(weights), weights)
    layout = choose_layout(data.shared.first, data.shared.in_features, 1, 1, Rotation.NONE)
    return StoredTransform((1 / scales)[:, None, None].to(_ALTERNATIVE), layout).invert()


def _of_modifier(
    label: str,
    rotation: Rotation = Rotation.HADAMARD,
    block_size: int | Literal["full"] | None = None,
    strength: float = 1.0,
) -> Transform:
    """Make an entry of ``TRANSFORMS``; parameters as in :func:`_cat`"""
    options: dict[str, Any] = {"rotation": rotation.value, "alignment_strength": strength}
    if block_size is not None:
        options["transform_block_size"] = block_size
    return Transform(label, _cat(rotation, block_size, strength), options)


TRANSFORMS = {
    "none": Transform("no transform", _cat(Rotation.NONE, 1, 0.0), {}),
    "scaling": Transform("SmoothQuant scaling", _smooth_scaling),
    "hadamard": _of_modifier("Hadamard", block_size=1, strength=0.0),
    "block-hadamard": _of_modifier("block Hadamard", Rotation.BLOCK_HADAMARD, strength=0.0),
    "cat-scaling": _of_modifier("CAT, k = 1", block_size=1),
    "cat": _of_modifier("CAT"),
    "cat-block-hadamard": _of_modifier("CAT, block Hadamard", Rotation.BLOCK_HADAMARD),
    "cat-eigen-hadamard": _of_modifier("CAT, eigen Hadamard", Rotation.EIGEN_HADAMARD),
    WHOLE: _of_modifier("CAT, full", block_size="full"),
}
