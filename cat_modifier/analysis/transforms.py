# SPDX-License-Identifier: Apache-2.0
"""
The transforms which the analysis compares. To add one, add it to ``TRANSFORMS``: a
function from what is known of an input and of its readers to what is inserted between them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cat_modifier.analysis.statistics import AnalysisStatistics
from cat_modifier.functional.layout import choose_layout
from cat_modifier.functional.transform import FusedTransform
from cat_modifier.functional.alignment import DEFAULT_DAMPENING_FRAC, alignment_transform, diagonal_blocks, inner_blocks
from cat_modifier.functional.layout import Rotation
from cat_modifier.functional.transform import rotate_blocks

__all__ = ["TRANSFORMS", "GroupData", "Transform"]

_PRECISION = torch.bfloat16
"""Of stored transforms, as CATModifier's default"""


@dataclass
class GroupData:
    """
    What is known of Linears which read the same input.

    :param name: of the first of them, for messages
    :param statistics: of the input
    :param block_size: k of CAT
    :param weights: of each Linear, shape (out, d), float32
    """

    name: str
    statistics: AnalysisStatistics
    block_size: int
    weights: Mapping[str, Tensor]
    _moments: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _alignments: dict[int, Tensor] = field(default_factory=dict)

    @property
    def features(self) -> int:
        """d, size of the input"""
        return next(iter(self.weights.values())).shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def known_size(self) -> int:
        """Size of the largest blocks of Sx that are known: k, or d if all of Sx is"""
        return self.statistics.moments.mean.shape[-1]

    def input_moments(self, block_size: int) -> Tensor:
        """
        :param block_size: a divisor of :attr:`known_size`
        :return: diagonal blocks of Sx, shape (d/k, k, k), float64
        """
        blocks = inner_blocks(self.statistics.moments.mean, block_size)
        return blocks.to(self.device, torch.float64)

    def weight_moments(self, block_size: int) -> dict[str, Tensor]:
        """
        :return: diagonal blocks of ``W^T W`` of each Linear, shape (d/k, k, k), float64
        """
        if block_size not in self._moments:
            self._moments[block_size] = {
                name: diagonal_blocks(weight, block_size).double()
                for name, weight in self.weights.items()
            }
        return self._moments[block_size]

    def alignment_transform(self, block_size: int) -> Tensor:
        """M, computed once for all rotations, shape (d/k, k, k), float64"""
        if block_size not in self._alignments:
            self._alignments[block_size] = alignment_transform(
                self.input_moments(block_size),
                sum(self.weight_moments(block_size).values()),
                alignment_strength=1.0,
                dampening_frac=DEFAULT_DAMPENING_FRAC,
            )
        return self._alignments[block_size]


class Transform(NamedTuple):
    """
    :param compute: the transform of one input
    :param needs_whole_moments: whether it needs all of Sx, and not its diagonal blocks
    :param label: for figures
    """

    compute: Callable[[GroupData], FusedTransform]
    needs_whole_moments: bool
    label: str


def _cat(rotation: Rotation, block_size: int | None = None, aligned: bool = True):
    """
    :param block_size: k; None for that of the analysis, 0 for the whole input
    :param aligned: whether the rotation is put after the alignment transform
    """

    def compute(data: GroupData) -> FusedTransform:
        size = {None: data.block_size, 0: data.features}.get(block_size, block_size)
        layout = choose_layout(data.name, data.features, 1, size, rotation)
        if data.known_size % layout.block_size:
            # moments of blocks that are cut otherwise are not known
            size = choose_layout(data.name, data.known_size, 1, size, rotation).block_size
            layout = choose_layout(data.name, data.features, 1, size, rotation)
        size = layout.block_size
        if aligned:
            blocks = data.alignment_transform(size)
        else:
            blocks = torch.eye(size, dtype=torch.float64, device=data.device)
            blocks = blocks.expand(data.features // size, size, size)
        moments = data.input_moments(size) if rotation is Rotation.EIGEN_HADAMARD else blocks
        blocks = rotate_blocks(blocks, moments, rotation, layout.fused_hadamard_size)
        return FusedTransform.from_blocks(blocks.to(_PRECISION), layout)

    return compute


def _smooth_scaling(data: GroupData) -> FusedTransform:
    """
    ``x_i / s_i`` with ``s_i = sqrt(max|x_i| / max|w_i|)`` (SmoothQuant, arXiv 2211.10438,
    equation 4 with its default strength 0.5)
    """
    inputs = data.statistics.maxima.to(data.device, torch.float64)
    weights = torch.stack([w.abs().amax(0) for w in data.weights.values()]).amax(0).double()
    # channels which are always zero on either side have nothing to be scaled for
    floor = torch.finfo(torch.float32).tiny
    alive = (inputs > floor) & (weights > floor)
    scales = torch.where(alive, (inputs / weights.clamp_min(floor)).sqrt(), 1.0)
    layout = choose_layout(data.name, data.features, 1, 1, Rotation.NONE)
    return FusedTransform.from_blocks((1 / scales)[:, None, None].to(_PRECISION), layout)


TRANSFORMS: dict[str, Transform] = {
    "none": Transform(_cat(Rotation.NONE, 1, aligned=False), False, "no transform"),
    "scaling": Transform(_smooth_scaling, False, "SmoothQuant scaling"),
    "hadamard": Transform(_cat(Rotation.HADAMARD, 1, aligned=False), False, "Hadamard"),
    "block-hadamard": Transform(
        _cat(Rotation.BLOCK_HADAMARD, aligned=False), False, "block Hadamard"
    ),
    "cat-scaling": Transform(_cat(Rotation.HADAMARD, 1), False, "CAT, k = 1"),
    "cat": Transform(_cat(Rotation.HADAMARD), False, "CAT"),
    "cat-block-hadamard": Transform(
        _cat(Rotation.BLOCK_HADAMARD), False, "CAT, block Hadamard"
    ),
    "cat-eigen-hadamard": Transform(
        _cat(Rotation.EIGEN_HADAMARD), False, "CAT, eigen Hadamard"
    ),
    "cat-full": Transform(_cat(Rotation.HADAMARD, 0), True, "CAT, full"),
}
