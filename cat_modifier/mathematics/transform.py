# SPDX-License-Identifier: Apache-2.0
"""
The concentration-alignment transform in closed form.

Notation, as in arXiv 2603.04359: a Linear is ``y = W x`` with ``W`` of shape (out, in);
``Sx = E[x x^T]`` and ``Sw = sum of W^T W`` over the Linears that read ``x``. A transform
``T`` replaces the Linear by ``y = (W T^-1)(T x)``.

Alignment of a block-diagonal ``T`` depends on ``G = T^T T`` and on the diagonal blocks of
``Sx`` and ``Sw`` alone: ``A = E||W x||^2 / (tr(Sw G^-1) tr(G Sx))``. Its maximum is at the
solution of the Riccati equation ``G Sx G = Sw``, the matrix geometric mean
``G = Sw # Sx^-1``, for each block on its own. Any rotation of ``T`` keeps it, and is free
to improve concentration: a Hadamard matrix spreads outliers over all channels.

All functions are batched over blocks: moments have shape (d/k, k, k), float64.
"""

from enum import StrEnum

import torch
from torch import Tensor

from cat_modifier.mathematics.hadamard import hadamard_matrix

__all__ = [
    "DEFAULT_DAMPING",
    "Rotation",
    "alignment_transform",
    "apply_blocks",
    "block_transform",
    "condition_number",
    "damp",
    "diagonal_blocks",
    "geometric_mean",
    "inner_blocks",
    "invert_blocks",
    "matrix_power",
    "rotate_blocks",
    "transformed_energy",
]

DEFAULT_DAMPING = 1e-2
"""See :func:`damp`"""


class Rotation(StrEnum):
    """
    What follows the alignment transform ``M`` of a block of size k

    | Name             | Stored block | After the blocks, at run time             |
    | ---------------- | ------------ | ----------------------------------------- |
    | `hadamard`       | H_q M        | H_p over channels that are q apart: both  |
    |                  |              | together are a Hadamard product of p * q  |
    | `block-hadamard` | H M          | nothing                                   |
    | `eigen-hadamard` | H V^T M      | nothing                                   |
    | `none`           | M            | nothing                                   |

    ``V`` are the eigenvectors of ``M Sx M^T``: all channels of a block then have the
    same second moment, for activations and for weights at once (arXiv 2512.00956).
    """

    HADAMARD = "hadamard"
    BLOCK_HADAMARD = "block-hadamard"
    EIGEN_HADAMARD = "eigen-hadamard"
    NONE = "none"

    @property
    def is_folded(self) -> bool:
        """Whether the rotation is part of the stored block"""
        return self in (Rotation.BLOCK_HADAMARD, Rotation.EIGEN_HADAMARD)


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """
    Power of symmetric positive semi-definite matrices. Eigenvalues that are zero up to
    rounding count as 1e-14 of the largest.

    :param matrix: shape (..., k, k), float64
    :return: shape (..., k, k)
    """
    values, vectors = torch.linalg.eigh(matrix)
    # rounding can make the smallest eigenvalues zero or negative
    floor = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny) * 1e-14
    values = values.clamp_min(floor)
    return (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """
    ``a # b = a^(1/2) (a^(-1/2) b a^(-1/2))^(1/2) a^(1/2)``

    Computed as ``L (L^-1 b L^-T)^(1/2) L^T`` with the Cholesky factor ``a = L L^T``, which
    is the same (the mean commutes with congruence) and needs one eigendecomposition.

    :param a: symmetric positive definite, shape (..., k, k), float64
    :param b: symmetric positive semi-definite, otherwise as ``a``
    :return: symmetric, shape (..., k, k)
    :raises ValueError: if ``a`` is not positive definite
    """
    factor, info = torch.linalg.cholesky_ex(a)
    if info.any():
        raise ValueError("The second moments are singular: raise `damping`")
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    inner = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    mean = factor @ matrix_power((inner + inner.mT) / 2, 0.5) @ factor.mT
    return (mean + mean.mT) / 2


def damp(moments: Tensor, damping: float) -> Tensor:
    """
    Add ``damping`` times each block's mean eigenvalue to its diagonal. A block without
    any energy (all of its channels dead) takes the mean over the other blocks instead,
    and the identity if there is none.

    :param moments: symmetric positive semi-definite, shape (d/k, k, k), float64
    :param damping: relative to the mean eigenvalue of the block, no unit
    :return: symmetric positive definite, shape (d/k, k, k)
    """
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    overall = mean.mean()
    # far below the other blocks is as good as dead: a ratio of 1e-12 in energy
    dead = mean <= overall * 1e-12
    level = torch.where(dead, overall if overall > 0 else torch.ones_like(mean), mean)
    # a dead block has nothing to align: make it white rather than nearly singular
    amount = torch.where(dead, level, damping * level)
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments + amount[:, None, None] * identity


def alignment_transform(
    input_moments: Tensor, weight_moments: Tensor, strength: float, damping: float
) -> Tensor:
    """
    ``M^strength`` with ``M = (Sw # Sx^-1)^(1/2)``, block by block [method: Riccati
    equation ``G Sx G = Sw`` for ``G = M^2``].

    :param input_moments: diagonal blocks of Sx, shape (d/k, k, k), float64
    :param weight_moments: diagonal blocks of Sw, shape (d/k, k, k), float64
    :param strength: 1 is optimal for uniform rounding noise, 0 gives the identity
    :param damping: see :func:`damp`
    :return: shape (d/k, k, k), float64; scaled so that ``tr(M Sx M) = tr(Sx)``: the
        transformed activations have the energy of the original ones
    :raises ValueError: if the moments are not finite
    """
    for name, moments in (("input", input_moments), ("weight", weight_moments)):
        if not torch.isfinite(moments).all():
            raise ValueError(f"The {name} second moments are not finite")
    sx, sw = damp(input_moments, damping), damp(weight_moments, damping)
    if strength == 0:
        return torch.eye(sx.shape[-1], dtype=sx.dtype, device=sx.device).expand_as(sx)
    transform = matrix_power(geometric_mean(torch.linalg.inv(sx), sw), strength / 2)
    energy = transformed_energy(transform, sx)
    return transform * (sx.diagonal(dim1=-2, dim2=-1).sum() / energy).sqrt()


def rotate_blocks(
    transform: Tensor,
    input_moments: Tensor,
    rotation: Rotation,
    inner: int,
    damping: float = DEFAULT_DAMPING,
) -> Tensor:
    """
    Put what is folded into the blocks of a rotation in front of them (see
    :class:`Rotation`).

    :param transform: of the alignment, shape (d/k, k, k), float64
    :param input_moments: diagonal blocks of Sx, shape (d/k, k, k), float64
    :param inner: q, order of the folded Hadamard matrix, a divisor or multiple of k
    :return: shape (d/s, s, s) with s the larger of k and q, float64
    :raises ValueError: if there is no Hadamard matrix of order q
    """
    if rotation is Rotation.EIGEN_HADAMARD:
        moments = transform @ damp(input_moments, damping) @ transform.mT
        transform = torch.linalg.eigh((moments + moments.mT) / 2)[1].mT @ transform
    if inner > transform.shape[-1]:
        transform = _merge_blocks(transform, inner)
    hadamard = hadamard_matrix(inner).to(transform.device)
    return (hadamard @ transform.unflatten(1, (-1, inner))).flatten(1, 2)


def _merge_blocks(blocks: Tensor, size: int) -> Tensor:
    """The same block-diagonal matrix with blocks of ``size``, a multiple of k"""
    count = size // blocks.shape[-1]
    identity = torch.eye(count, dtype=blocks.dtype, device=blocks.device)
    neighbours = blocks.unflatten(0, (-1, count))
    # (b, i, r, c) -> (b, i, r, j, c), zero unless i = j
    merged = neighbours[:, :, :, None, :] * identity[:, None, :, None]
    return merged.flatten(3, 4).flatten(1, 2)


def block_transform(
    input_moments: Tensor,
    weight_moments: Tensor,
    rotation: Rotation,
    inner: int,
    strength: float = 1.0,
    damping: float = DEFAULT_DAMPING,
) -> Tensor:
    """
    The blocks of CAT as they are stored: the alignment transform, then what is folded of
    the rotation.

    :param input_moments: diagonal blocks of Sx, shape (d/k, k, k), float64
    :param weight_moments: diagonal blocks of Sw, shape (d/k, k, k), float64
    :param inner: q, order of the folded Hadamard matrix, a divisor or multiple of k
    :return: shape (d/s, s, s) with s the larger of k and q, float64
    :raises ValueError: if the moments are not finite, or if there is no Hadamard matrix of
        order q
    """
    transform = alignment_transform(input_moments, weight_moments, strength, damping)
    return rotate_blocks(transform, input_moments, rotation, inner, damping)


def invert_blocks(blocks: Tensor) -> Tensor:
    """
    :param blocks: transform blocks as they are stored, shape (d/k, k, k), any dtype
    :return: their inverses, float64
    :raises ValueError: if a block is singular or not finite
    """
    blocks = blocks.to(torch.float64)
    inverse, info = torch.linalg.inv_ex(blocks)
    if info.any() or not torch.isfinite(inverse).all():
        raise ValueError(
            "A transform block is singular after its cast to the stored dtype: raise "
            "`damping` or store the transform with a higher `precision`"
        )
    return inverse


def condition_number(blocks: Tensor) -> float:
    """Largest over smallest singular value of the block-diagonal matrix"""
    values = torch.linalg.svdvals(blocks.to(torch.float64))
    return (values.max() / values.min()).item()


def transformed_energy(blocks: Tensor, input_moments: Tensor) -> float:
    """
    ``E||T x||^2 = tr(T Sx T^T)`` of a block-diagonal ``T``

    :param blocks: shape (d/s, s, s). s may be a multiple of k if ``T^T T`` has blocks of k
        nevertheless: if what mixes them is a rotation
    :param input_moments: diagonal blocks of Sx, shape (d/k, k, k), float64
    """
    blocks = blocks.to(input_moments.dtype)
    gram = inner_blocks(blocks.mT @ blocks, input_moments.shape[-1])
    return (gram * input_moments).sum().item()


def diagonal_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """
    Diagonal blocks of ``matrix^T matrix`` without forming it.

    :param matrix: shape (rows, d), e.g. a weight or tokens
    :return: shape (d/k, k, k), dtype of ``matrix``
    """
    if block_size == 1:  # d products of vectors would be slow
        return torch.linalg.vector_norm(matrix, dim=0).square()[:, None, None]
    blocks = matrix.unflatten(-1, (-1, block_size)).movedim(-2, 0)
    return blocks.mT @ blocks


def inner_blocks(blocks: Tensor, size: int) -> Tensor:
    """
    Diagonal blocks of diagonal blocks.

    :param blocks: shape (d/s, s, s)
    :param size: k, a divisor of s
    :return: shape (d/k, k, k)
    """
    count = blocks.shape[-1] // size
    blocks = blocks.unflatten(-1, (count, size)).unflatten(1, (count, size))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def apply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """
    ``T x`` for every vector of a tensor and a block-diagonal ``T``.

    :param x: shape (..., d)
    :param blocks: shape (d/k, k, k), dtype of x
    :return: shape (..., d)
    """
    count, size, _ = blocks.shape
    rows = x.reshape(-1, count, size).transpose(0, 1)
    return torch.bmm(rows, blocks.mT).transpose(0, 1).reshape(x.shape)
