# SPDX-License-Identifier: Apache-2.0
"""
The transforms that the analysis compares.

To add one, add it to ``TRANSFORMS``: a function from what is known of an input to the
transform before the Linears that read it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cat_modifier.calibration.collector import InputStatistics
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.alignment import (
    DEFAULT_DAMPENING_FRAC,
    alignment_transform,
    diagonal_blocks,
    inner_blocks,
)
from cat_modifier.functional.layout import Rotation, TransformLayout, choose_layout
from cat_modifier.functional.transform import FusedTransform, rotate_blocks

__all__ = ["TRANSFORMS", "AnalysisStatistics", "AnalyzedInput", "check_transforms"]

_PRECISION = torch.bfloat16
"""Dtype of stored transforms, CATModifier's default"""


class AnalysisStatistics(InputStatistics):
    """Second moments, a token sample and the channel maxima ``max|x_i|`` of one input"""

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
    :param shared: an input and the Linears that read it
    :param statistics: statistics of the input
    :param block_size: k of CAT
    :param weights: weights by name of the Linear, each of shape (out, d), float32
    """

    shared: SharedInput
    statistics: AnalysisStatistics
    block_size: int
    weights: Mapping[str, Tensor]
    _weight_moments: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _alignments: dict[int, Tensor] = field(default_factory=dict)

    @property
    def known_size(self) -> int:
        """Size of the largest known blocks of Sx: k, or d if all of Sx is known"""
        return self.statistics.second_moments.mean.shape[-1]

    def layout(self, block_size: int, rotation: Rotation) -> TransformLayout:
        """The layout of a transform with blocks of at most `block_size`"""
        return choose_layout(
            self.shared.first, self.shared.in_features, 1, block_size, rotation
        )

    def input_moments(self, block_size: int) -> Tensor:
        """Diagonal blocks of Sx, shape (d/k, k, k), float64; k divides `known_size`"""
        blocks = inner_blocks(self.statistics.second_moments.mean, block_size)
        return blocks.to(self.weights[self.shared.first].device, torch.float64)

    def weight_moments(self, block_size: int) -> dict[str, Tensor]:
        """Diagonal blocks of ``W^T W`` of each Linear, shape (d/k, k, k), float64"""
        if block_size not in self._weight_moments:
            self._weight_moments[block_size] = {
                name: diagonal_blocks(weight, block_size).double()
                for name, weight in self.weights.items()
            }
        return self._weight_moments[block_size]

    def alignment_transform(self, block_size: int) -> Tensor:
        """M, computed once for all rotations, shape (d/k, k, k), float64"""
        if block_size not in self._alignments:
            sx, sw = self.input_moments(block_size), self.weight_moments(block_size)
            self._alignments[block_size] = alignment_transform(
                sx, sum(sw.values()), 1.0, DEFAULT_DAMPENING_FRAC
            )
        return self._alignments[block_size]


class Transform(NamedTuple):
    """
    :param label: name in figures and tables
    :param compute: function that makes the transform of one input
    :param needs_whole_moments: whether it needs all of Sx, not only diagonal blocks
    """

    label: str
    compute: Callable[[AnalyzedInput], FusedTransform]
    needs_whole_moments: bool = False


def _cat(rotation: Rotation, block_size: int | None = None, aligned: bool = True):
    """
    Make the function of a CAT transform.

    :param block_size: k; None for the analysis' own, 0 for the whole input
    :param aligned: whether the alignment transform comes before the rotation
    """

    def compute(data: AnalyzedInput) -> FusedTransform:
        in_features, known = data.shared.in_features, data.known_size
        size = {None: data.block_size, 0: in_features}.get(block_size, block_size)
        layout = data.layout(size, rotation)
        if known % layout.block_size:
            # only blocks that divide the known ones have known moments
            size = choose_layout(data.shared.first, known, 1, size, rotation).block_size
            layout = data.layout(size, rotation)
        size = layout.block_size
        sx = data.input_moments(size)
        if aligned:
            blocks = data.alignment_transform(size)
        else:
            blocks = torch.eye(size, dtype=torch.float64, device=sx.device).expand_as(sx)
        blocks = rotate_blocks(blocks, sx, rotation, layout.fused_hadamard_size)
        return FusedTransform.from_blocks(blocks.to(_PRECISION), layout)

    return compute


def _smooth_scaling(data: AnalyzedInput) -> FusedTransform:
    """
    Scale each channel by ``1 / s_i`` with ``s_i = sqrt(max|x_i| / max|w_i|)`` (SmoothQuant,
    arXiv 2211.10438, equation 4 with its default strength 0.5).
    """
    weights = torch.stack([w.abs().amax(0) for w in data.weights.values()]).amax(0).double()
    inputs = data.statistics.maxima.to(weights)
    # a channel that is always zero on either side needs no scale
    floor = torch.finfo(torch.float32).tiny
    alive = (inputs > floor) & (weights > floor)
    scales = torch.where(alive, (inputs / weights.clamp_min(floor)).sqrt(), 1.0)
    blocks = (1 / scales)[:, None, None].to(_PRECISION)
    return FusedTransform.from_blocks(blocks, data.layout(1, Rotation.NONE))


TRANSFORMS = {
    "none": Transform("no transform", _cat(Rotation.NONE, 1, aligned=False)),
    "scaling": Transform("SmoothQuant scaling", _smooth_scaling),
    "hadamard": Transform("Hadamard", _cat(Rotation.HADAMARD, 1, aligned=False)),
    "block-hadamard": Transform("block Hadamard", _cat(Rotation.BLOCK_HADAMARD, aligned=False)),
    "cat-scaling": Transform("CAT, k = 1", _cat(Rotation.HADAMARD, 1)),
    "cat": Transform("CAT", _cat(Rotation.HADAMARD)),
    "cat-block-hadamard": Transform("CAT, block Hadamard", _cat(Rotation.BLOCK_HADAMARD)),
    "cat-eigen-hadamard": Transform("CAT, eigen Hadamard", _cat(Rotation.EIGEN_HADAMARD)),
    "cat-full": Transform("CAT, full", _cat(Rotation.HADAMARD, 0), needs_whole_moments=True),
}


def check_transforms(names: Iterable[str]):
    """
    :raises ValueError: if a name is not in ``TRANSFORMS``
    """
    if unknown := [name for name in names if name not in TRANSFORMS]:
        raise ValueError(
            f"Unknown transform {unknown[0]!r}: it should be one of {', '.join(TRANSFORMS)}"
        )
