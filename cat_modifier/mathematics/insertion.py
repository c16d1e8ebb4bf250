# SPDX-License-Identifier: Apache-2.0
"""From the moments of an input to its transform, and to the weights that undo it"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_modifier.mathematics.geometry import Geometry
from cat_modifier.mathematics.hadamard import apply_hadamard, hadamard_matrix
from cat_modifier.mathematics.transform import (
    Rotation,
    apply_blocks,
    block_transform,
    diagonal_blocks,
    invert_blocks,
)

__all__ = ["Insertion", "compute_insertion"]


@dataclass(frozen=True)
class Insertion:
    """
    :param blocks: T as it is stored, with the inner Hadamard matrix in it, shape
        (d/s, s, s)
    :param inverse: of the stored T, which makes the product of what the two methods return
        exact; shape (d/s, s, s), float64
    :param geometry: of both
    """

    blocks: Tensor
    inverse: Tensor
    geometry: Geometry

    @classmethod
    def from_blocks(cls, blocks: Tensor, geometry: Geometry) -> "Insertion":
        """
        :param blocks: T as it is to be stored, shape (d/s, s, s)
        :raises ValueError: if T is singular
        """
        return cls(blocks, invert_blocks(blocks), geometry)

    def transform_tokens(self, tokens: Tensor) -> Tensor:
        """
        :param tokens: shape (tokens, d), the dtype to compute in
        :return: ``H T x`` of each
        """
        return self._rotate(apply_blocks(tokens, self.blocks.to(tokens.dtype)))

    def transform_weight(self, weight: Tensor) -> Tensor:
        """
        :param weight: shape (out, d), the dtype to compute in
        :return: ``W T^-1 H^T``
        """
        return self._rotate(apply_blocks(weight, self.inverse.mT.to(weight.dtype)))

    def transform_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.transform_weight(weight) for name, weight in weights.items()}

    def _rotate(self, rows: Tensor) -> Tensor:
        if self.geometry.outer == 1:
            return rows
        matrix = hadamard_matrix(self.geometry.outer).to(rows)
        return apply_hadamard(rows, matrix, self.geometry.inner)


def compute_insertion(
    input_moments: Tensor | None,
    weights: Mapping[str, Tensor],
    geometry: Geometry,
    rotation: Rotation,
    strength: float,
    damping: float,
    precision: torch.dtype,
    repeats: int = 1,
) -> Insertion:
    """
    :param input_moments: diagonal blocks of Sx, shape (d/k, k, k); None if nothing is known
        of the input, and the transform is to be the rotation alone
    :param weights: of the Linears which read the input, each of shape (out, d), float64
    :param precision: dtype of the stored blocks
    :param repeats: neighbouring blocks which are to be the same, as heads that share their
        values
    :raises ValueError: if moments are not finite, or the stored transform is singular
    """
    size = geometry.block_size
    weight_moments = sum(diagonal_blocks(weight, size) for weight in weights.values())
    device = weight_moments.device
    if input_moments is None:
        identity = torch.eye(size, dtype=torch.float64, device=device)
        input_moments, strength = identity.expand_as(weight_moments), 0.0
    # what is best for several blocks at once depends on their sums alone
    moments = (
        one.unflatten(0, (-1, repeats)).sum(1)
        for one in (input_moments.to(device, torch.float64), weight_moments)
    )
    blocks = block_transform(*moments, rotation, geometry.inner, strength, damping)
    blocks = blocks.repeat_interleave(repeats, 0).to(precision)
    return Insertion.from_blocks(blocks, geometry)
