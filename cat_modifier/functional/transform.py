# SPDX-License-Identifier: Apache-2.0
"""
The transform T of one input: compute it, apply it, invert it, and fuse it into weights.

CAT multiplies an input by blocks, then by a Hadamard matrix (arXiv 2603.04359). Blocks are
``T_i = H_q M_i``: the alignment transform of a block and the fused part of the Hadamard
matrix. The online part of order p multiplies channels that are q apart. Together the two
parts are one Hadamard product over p * q channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cat_modifier.functional.alignment import (
    DEFAULT_DAMPENING_FRAC,
    alignment_transform,
    dampen,
)
from cat_modifier.functional.clipping import clip_tokens
from cat_modifier.functional.hadamard import apply_hadamard, hadamard_matrix
from cat_modifier.functional.layout import Rotation, TransformLayout
from cat_modifier.functional.stored import dequantize_blocks, fits_int8, store_blocks

__all__ = [
    "FusedTransform",
    "StoredTransform",
    "apply_blocks",
    "apply_transform",
    "compute_blocks",
    "invert_blocks",
    "multiply_heads",
    "rotate_blocks",
    "store_transform",
]


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """
    Multiply each vector of a tensor by a block-diagonal matrix.

    :param x: shape (..., d)
    :param blocks: shape (d/k, k, k), dtype of x
    :return: shape (..., d)
    """
    count, size, _ = blocks.shape
    rows = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(rows, blocks.mT).transpose(0, 1).reshape(x.shape)


def apply_transform(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None = None,
    interleave: int = 1,
    clip_ratio: float | Tensor = 1.0,
) -> Tensor:
    """
    Multiply tokens by the blocks, then by the online Hadamard matrix, then clip them.

    :param x: shape (..., d), the dtype to compute in
    :param blocks: T as stored, shape (d/k, k, k), floating point or int8; None for no blocks
    :param hadamard: online Hadamard matrix, shape (p, p), any dtype; None for none
    :param interleave: q, distance of the channels that ``hadamard`` multiplies
    :param clip_ratio: see :func:`cat_modifier.functional.clipping.clip_tokens`; 1 does not
        clip
    :return: shape and dtype of x
    """
    if blocks is not None:
        x = apply_blocks(x, dequantize_blocks(blocks, x.dtype))
    if hadamard is not None:
        x = apply_hadamard(x, hadamard.to(x.dtype), interleave)
    if isinstance(clip_ratio, Tensor) or clip_ratio < 1:
        x = clip_tokens(x, clip_ratio)
    return x


def multiply_heads(rows: Tensor, blocks: Tensor) -> Tensor:
    """
    Multiply the rows of a weight, or a bias, by one block per head.

    Used to fuse the transform before o_proj into v_proj.

    :param rows: shape (heads * head_dim, ...)
    :param blocks: shape (heads, head_dim, head_dim), dtype of rows
    :return: shape and dtype of rows
    """
    heads = rows.unflatten(0, (blocks.shape[0], -1))
    return torch.einsum("hij,hj...->hi...", blocks, heads).flatten(0, 1)


def rotate_blocks(
    transform: Tensor,
    sx: Tensor,
    rotation: Rotation,
    fused_hadamard_size: int,
    dampening_frac: float = DEFAULT_DAMPENING_FRAC,
) -> Tensor:
    """
    Multiply the alignment transform by the part of the rotation that is fused into blocks.

    :param transform: M, shape (d/k, k, k), float64
    :param sx: diagonal blocks of Sx, shape (d/k, k, k), float64. Only `eigen-hadamard`
        reads it
    :param rotation: see :class:`Rotation`
    :param fused_hadamard_size: q, a divisor or multiple of k
    :param dampening_frac: see :func:`cat_modifier.functional.alignment.dampen`
    :return: shape (d/s, s, s) with s the larger of k and q, float64
    :raises ValueError: if no Hadamard matrix of order q is known
    """
    if rotation is Rotation.EIGEN_HADAMARD:
        second_moments = transform @ dampen(sx, dampening_frac) @ transform.mT
        symmetric = (second_moments + second_moments.mT) / 2
        transform = torch.linalg.eigh(symmetric)[1].mT @ transform
    if fused_hadamard_size > transform.shape[-1]:
        transform = _merge_blocks(transform, fused_hadamard_size)
    hadamard = hadamard_matrix(fused_hadamard_size).to(transform.device)
    return (hadamard @ transform.unflatten(1, (-1, fused_hadamard_size))).flatten(1, 2)


def _merge_blocks(blocks: Tensor, size: int) -> Tensor:
    """Represent a block-diagonal matrix with larger blocks; ``size`` is a multiple of k"""
    count = size // blocks.shape[-1]
    identity = torch.eye(count, dtype=blocks.dtype, device=blocks.device)
    neighbours = blocks.unflatten(0, (-1, count))
    # (b, i, r, c) -> (b, i, r, j, c), zero unless i = j
    merged = neighbours[:, :, :, None, :] * identity[:, None, :, None]
    return merged.flatten(3, 4).flatten(1, 2)


def compute_blocks(
    sx: Tensor,
    sw: Tensor,
    rotation: Rotation,
    fused_hadamard_size: int,
    alignment_strength: float = 1.0,
    dampening_frac: float = DEFAULT_DAMPENING_FRAC,
) -> Tensor:
    """
    Compute the blocks of CAT: the alignment transform, then the fused part of the rotation.

    :param sx: diagonal blocks of Sx, shape (d/k, k, k), float64
    :param sw: diagonal blocks of Sw, shape (d/k, k, k), float64
    :param fused_hadamard_size: q, a divisor or multiple of k
    :return: shape (d/s, s, s) with s the larger of k and q, float64
    :raises ValueError: if the second moments are not finite, or no Hadamard matrix of order
        q is known
    """
    transform = alignment_transform(sx, sw, alignment_strength, dampening_frac)
    return rotate_blocks(transform, sx, rotation, fused_hadamard_size, dampening_frac)


def invert_blocks(blocks: Tensor) -> Tensor:
    """
    Invert the blocks of a transform as they are stored.

    :param blocks: shape (d/k, k, k), floating point or int8
    :return: shape (d/k, k, k), float64
    :raises ValueError: if a block is singular or not finite
    """
    blocks = dequantize_blocks(blocks, torch.float64)
    inverse, info = torch.linalg.inv_ex(blocks)
    if info.any() or not torch.isfinite(inverse).all():
        raise ValueError(
            "A transform block is singular after its cast to the stored dtype: raise "
            "`dampening_frac` or store the transform with a higher `precision`"
        )
    return inverse


@dataclass(frozen=True)
class StoredTransform:
    """
    A transform as a checkpoint stores it.

    :param blocks: T as stored, shape (d/s, s, s), dtype of the checkpoint, see
        :mod:`cat_modifier.functional.stored`; float64 where
        T itself is fused into the rows of another Linear
    :param layout: sizes of the blocks and of the Hadamard product
    """

    blocks: Tensor
    layout: TransformLayout

    def invert(self) -> "FusedTransform":
        """
        Compute the inverse, which is several times as large as the stored blocks.

        :raises ValueError: if T is singular
        """
        return FusedTransform(self.blocks, self.layout, invert_blocks(self.blocks))

    def transform_tokens(self, tokens: Tensor) -> Tensor:
        """
        Compute ``H T x``.

        :param tokens: shape (tokens, d), the dtype to compute in
        """
        return apply_transform(tokens, self.blocks, self._hadamard(), self.layout.interleave)

    def _hadamard(self) -> Tensor | None:
        if self.layout.online_hadamard_size == 1:
            return None
        return hadamard_matrix(self.layout.online_hadamard_size).to(self.blocks.device)


@dataclass(frozen=True)
class FusedTransform(StoredTransform):
    """
    A transform with its inverse. The inverse is fused into the weights of the Linears that
    read the input.

    It is the inverse of T *as stored*, so that rounding T does not change the function of the
    model.

    :param inverse: inverse of ``blocks``, shape (d/s, s, s), float64
    """

    inverse: Tensor

    def transform_weight(self, weight: Tensor) -> Tensor:
        """
        Compute ``W T^-1 H^T``.

        :param weight: shape (out, d), the dtype to compute in
        """
        return apply_transform(
            weight, self.inverse.mT, self._hadamard(), self.layout.interleave
        )


def store_transform(
    blocks: Tensor,
    layout: TransformLayout,
    stored: Tensor,
    alternative: torch.dtype | None = None,
) -> StoredTransform:
    """
    Round the blocks of a transform to their stored dtype.

    :param blocks: T, shape (d/s, s, s), float64
    :param layout: sizes of the transform
    :param stored: receives the blocks, shape of ``blocks``, dtype of the checkpoint
    :param alternative: dtype to store in instead, if ``stored`` is int8 and does not hold T
        well; None to take int8 in any case
    """
    if stored.dtype == torch.int8 and alternative is not None and not fits_int8(blocks):
        stored = torch.empty_like(stored, dtype=alternative)
    store_blocks(blocks, stored)
    return StoredTransform(stored, layout)
