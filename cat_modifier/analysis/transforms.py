# SPDX-License-Identifier: Apache-2.0
"""
The transforms that the analysis compares.

To add one, add it to ``TRANSFORMS``: a function from an input to the transform before the
Linears that read it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from cat_modifier.analysis.inputs import AnalyzedInput
from cat_modifier.functional.layout import Rotation, choose_layout
from cat_modifier.functional.transform import FusedTransform, rotate_blocks

__all__ = ["TRANSFORMS", "Transform", "check_transforms"]

_PRECISION = torch.bfloat16
"""Dtype of stored transforms, CATModifier's default"""


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
        size = {None: data.block_size, 0: data.in_features}.get(block_size, block_size)
        layout = choose_layout(data.name, data.in_features, 1, size, rotation)
        if data.known_size % layout.block_size:
            # only blocks that divide the known ones have known moments
            size = choose_layout(data.name, data.known_size, 1, size, rotation).block_size
            layout = choose_layout(data.name, data.in_features, 1, size, rotation)
        size = layout.block_size
        if aligned:
            blocks = data.alignment_transform(size)
        else:
            blocks = torch.eye(size, dtype=torch.float64, device=data.device)
            blocks = blocks.expand(data.in_features // size, size, size)
        moments = data.input_moments(size) if rotation is Rotation.EIGEN_HADAMARD else blocks
        blocks = rotate_blocks(blocks, moments, rotation, layout.fused_hadamard_size)
        return FusedTransform.from_blocks(blocks.to(_PRECISION), layout)

    return compute


def _smooth_scaling(data: AnalyzedInput) -> FusedTransform:
    """
    Scale each channel by ``1 / s_i`` with ``s_i = sqrt(max|x_i| / max|w_i|)`` (SmoothQuant,
    arXiv 2211.10438, equation 4 with its default strength 0.5).
    """
    inputs = data.statistics.maxima.to(data.device, torch.float64)
    weights = torch.stack([w.abs().amax(0) for w in data.weights.values()]).amax(0).double()
    # a channel that is always zero on either side needs no scale
    floor = torch.finfo(torch.float32).tiny
    alive = (inputs > floor) & (weights > floor)
    scales = torch.where(alive, (inputs / weights.clamp_min(floor)).sqrt(), 1.0)
    layout = choose_layout(data.name, data.in_features, 1, 1, Rotation.NONE)
    return FusedTransform.from_blocks((1 / scales)[:, None, None].to(_PRECISION), layout)


TRANSFORMS: dict[str, Transform] = {
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
