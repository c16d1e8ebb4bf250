# SPDX-License-Identifier: Apache-2.0
"""
The alignment transform M in closed form, from second moments of inputs and weights.

Notation of arXiv 2603.04359: a Linear is ``y = W x`` with ``W`` of shape (out, in).
``Sx = E[x x^T]`` is the second moment of its input (GPTQ's Hessian up to a factor).
``Sw = sum of W^T W`` over the Linears that read ``x``. A transform ``T`` replaces the
Linear by ``y = (W T^-1)(T x)``.

The alignment of a block-diagonal ``T`` depends on ``G = T^T T`` and on the diagonal blocks
of ``Sx`` and ``Sw`` alone: ``A = E||W x||^2 / (tr(Sw G^-1) tr(G Sx))``. It is largest for
the solution of the Riccati equation ``G Sx G = Sw``, the matrix geometric mean
``G = Sw # Sx^-1``, block by block. A rotation after ``T`` keeps the alignment.

All functions are batched over blocks: ``sx`` and ``sw`` have shape (d/k, k, k).
"""

import torch
from torch import Tensor

__all__ = [
    "DEFAULT_DAMPENING_FRAC",
    "alignment_transform",
    "condition_number",
    "correlation_rank",
    "dampen",
    "diagonal_blocks",
    "geometric_mean",
    "inner_blocks",
    "matrix_power",
    "transformed_energy",
]

DEFAULT_DAMPENING_FRAC = 1e-2
"""See :func:`dampen`"""

_RANK_TOLERANCE = 1e-5
"""Bound of the relative rounding of float32 means"""


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """
    Raise symmetric positive semi-definite matrices to a power.

    Eigenvalues below 1e-14 of the largest count as 1e-14 of it.

    :param matrix: shape (..., k, k), float64
    :param exponent: any real number
    :return: shape (..., k, k), float64
    """
    values, vectors = torch.linalg.eigh(matrix)
    # rounding can make the smallest eigenvalues zero or negative
    floor = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny) * 1e-14
    values = values.clamp_min(floor)
    return (vectors * values.pow(exponent).unsqueeze(-2)) @ vectors.mT


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """
    Compute the matrix geometric mean ``a # b = a^(1/2) (a^(-1/2) b a^(-1/2))^(1/2) a^(1/2)``.

    It equals ``L (L^-1 b L^-T)^(1/2) L^T`` with the Cholesky factor ``a = L L^T``, since the
    mean commutes with congruence. That form needs one eigendecomposition.

    :param a: symmetric positive definite, shape (..., k, k), float64
    :param b: symmetric positive semi-definite, shape (..., k, k), float64
    :return: symmetric, shape (..., k, k), float64
    :raises ValueError: if ``a`` is not positive definite
    """
    factor, info = torch.linalg.cholesky_ex(a)
    if info.any():
        raise ValueError("The second moments are singular: raise `dampening_frac`")
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    inner = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    mean = factor @ matrix_power((inner + inner.mT) / 2, 0.5) @ factor.mT
    return (mean + mean.mT) / 2


def dampen(second_moments: Tensor, dampening_frac: float) -> Tensor:
    """
    Add ``dampening_frac`` times each block's mean eigenvalue to its diagonal.

    A block without energy (all of its channels dead) gets the mean over the other blocks
    instead, or the identity if all are dead.

    :param second_moments: symmetric positive semi-definite, shape (d/k, k, k), float64
    :param dampening_frac: fraction of the mean eigenvalue of the block
    :return: symmetric positive definite, shape (d/k, k, k), float64
    """
    mean = second_moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    overall = mean.mean()
    # a block far below the others counts as dead: a ratio of 1e-12 in energy
    dead = mean <= overall * 1e-12
    level = torch.where(dead, overall if overall > 0 else torch.ones_like(mean), mean)
    # a dead block has nothing to align: make it white rather than nearly singular
    amount = torch.where(dead, level, dampening_frac * level)
    identity = torch.eye(
        second_moments.shape[-1], dtype=second_moments.dtype, device=second_moments.device
    )
    return second_moments + amount[:, None, None] * identity


def alignment_transform(
    sx: Tensor, sw: Tensor, alignment_strength: float, dampening_frac: float
) -> Tensor:
    """
    Compute ``M^s`` with ``M = (Sw # Sx^-1)^(1/2)``, block by block.

    ``G = M^2`` solves the Riccati equation ``G Sx G = Sw``, so that ``M`` reaches the best
    alignment of all block-diagonal transforms.

    :param sx: diagonal blocks of Sx, shape (d/k, k, k), float64
    :param sw: diagonal blocks of Sw, shape (d/k, k, k), float64
    :param alignment_strength: exponent s; 1 is optimal for uniform rounding noise, 0 gives
        the identity
    :param dampening_frac: see :func:`dampen`
    :return: shape (d/k, k, k), float64; scaled so that ``tr(M Sx M) = tr(Sx)``
    :raises ValueError: if the second moments are not finite
    """
    for name, second_moments in (("input", sx), ("weight", sw)):
        if not torch.isfinite(second_moments).all():
            raise ValueError(f"The {name} second moments are not finite")
    sx, sw = dampen(sx, dampening_frac), dampen(sw, dampening_frac)
    if alignment_strength == 0:
        return torch.eye(sx.shape[-1], dtype=sx.dtype, device=sx.device).expand_as(sx)
    mean = geometric_mean(torch.linalg.inv(sx), sw)
    transform = matrix_power(mean, alignment_strength / 2)
    energy = transformed_energy(transform, sx)
    return transform * (sx.diagonal(dim1=-2, dim2=-1).sum() / energy).sqrt()


def condition_number(blocks: Tensor) -> float:
    """
    Compute the largest over the smallest singular value of a block-diagonal matrix.

    :param blocks: shape (d/k, k, k), any floating point dtype
    """
    values = torch.linalg.svdvals(blocks.to(torch.float64))
    return (values.max() / values.min()).item()


def transformed_energy(blocks: Tensor, sx: Tensor) -> float:
    """
    Compute ``E||T x||^2 = tr(T Sx T^T)`` of a block-diagonal ``T``.

    :param blocks: T, shape (d/s, s, s). s may be a multiple of k if only a rotation mixes
        several blocks of k: ``T^T T`` then still has blocks of k
    :param sx: diagonal blocks of Sx, shape (d/k, k, k), float64
    """
    blocks = blocks.to(sx.dtype)
    gram = inner_blocks(blocks.mT @ blocks, sx.shape[-1])
    return (gram * sx).sum().item()


def diagonal_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """
    Compute the diagonal blocks of ``matrix^T matrix`` without forming it.

    :param matrix: a weight or tokens, shape (rows, d)
    :param block_size: k, a divisor of d
    :return: shape (d/k, k, k), dtype of ``matrix``
    """
    if block_size == 1:  # d products of vectors would be slow
        return torch.linalg.vector_norm(matrix, dim=0).square()[:, None, None]
    blocks = matrix.unflatten(-1, (-1, block_size)).movedim(-2, 0)
    return blocks.mT @ blocks


def inner_blocks(blocks: Tensor, size: int) -> Tensor:
    """
    Take smaller diagonal blocks out of diagonal blocks.

    :param blocks: shape (d/s, s, s)
    :param size: k, a divisor of s
    :return: shape (d/k, k, k)
    """
    count = blocks.shape[-1] // size
    blocks = blocks.unflatten(-1, (count, size)).unflatten(1, (count, size))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)


def correlation_rank(second_moments: Tensor) -> int:
    """
    Count the directions of a block that the tokens reach. The largest count of all blocks.

    Channels are scaled to equal energy first: outliers would hide small channels.

    :param second_moments: shape (d/k, k, k), float32 or float64
    """
    blocks = second_moments.to(torch.float64)
    energies = blocks.diagonal(dim1=-2, dim2=-1)
    scales = torch.where(energies > 0, energies, 1).rsqrt()
    correlation = blocks * scales[:, :, None] * scales[:, None, :]
    # second moments are float32 means: rounding looks like small eigenvalues
    rank = torch.linalg.matrix_rank(correlation, hermitian=True, rtol=_RANK_TOLERANCE)
    return int(rank.max())
