# SPDX-License-Identifier: Apache-2.0
"""
Normalised Hadamard matrices and their product with an activation.

A Hadamard matrix of order ``n`` has entries ``+-1/sqrt(n)`` and orthogonal rows. The
matrices here are a function of ``n`` alone, because a checkpoint stores the order and
never the matrix: whoever reads it must rebuild exactly the same one.

Orders are products of 2 and of the orders ``q + 1`` and ``2(q + 1)`` of Paley's
constructions over prime fields (R. Paley, "On orthogonal matrices", 1933). This covers
the widths of current models: 576 = 2^4 * 36, 1536 = 2^7 * 12, 14336 = 2^9 * 28, ...
"""

from functools import cache, lru_cache
from math import isqrt, sqrt

import torch
from torch import Tensor

__all__ = [
    "apply_hadamard",
    "hadamard_matrix",
    "is_hadamard_order",
    "largest_hadamard_order",
    "split_hadamard",
]


_MAX_PALEY_ORDER = 256
"""Factors which are no powers of two are applied as dense matrices: keep them small"""


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, isqrt(n) + 1))


def _is_paley_order(n: int) -> bool:
    """Whether Paley's first or second construction over a prime field has order n"""
    if n < 4 or n % 4:
        return False
    first = _is_prime(n - 1) and (n - 1) % 4 == 3
    second = _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1
    return first or second


@cache
def _kronecker_orders(n: int) -> tuple[int, ...] | None:
    """Factors of n, each 2 or a Paley order, or None; 1 has no factors"""
    if n == 1:
        return ()
    if n % 2:
        return None
    # powers of two first: a single small Paley factor keeps products cheap
    if (rest := _kronecker_orders(n // 2)) is not None:
        return (2, *rest)
    for order in range(12, min(n, _MAX_PALEY_ORDER) + 1, 4):
        if n % order == 0 and _is_paley_order(order):
            if (rest := _kronecker_orders(n // order)) is not None:
                return (order, *rest)
    return None


def is_hadamard_order(n: int) -> bool:
    """Whether :func:`hadamard_matrix` can build a matrix of order ``n``"""
    return n >= 1 and _kronecker_orders(n) is not None


def largest_hadamard_order(n: int) -> int:
    """Largest divisor of ``n`` which is a Hadamard order; 1 at worst"""
    return next(m for m in range(n, 0, -1) if n % m == 0 and is_hadamard_order(m))


def _paley(n: int) -> Tensor:
    """Paley's Hadamard matrix of order n, entries +-1, float64"""
    first = _is_prime(n - 1) and (n - 1) % 4 == 3
    q = n - 1 if first else n // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    character = [0] + [1 if i in squares else -1 for i in range(1, q)]
    index = torch.arange(q)
    jacobsthal = torch.tensor(character, dtype=torch.float64)[
        (index[:, None] - index[None, :]) % q
    ]

    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if first else 1
    conference[1:, 1:] = jacobsthal
    identity = torch.eye(q + 1, dtype=torch.float64)
    if first:  # the conference matrix is skew: I + C
        return identity + conference
    # symmetric: replace its entries by 2 x 2 blocks
    ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    zeros = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(conference, ones) + torch.kron(identity, zeros)


@lru_cache(maxsize=32)
def hadamard_matrix(n: int) -> Tensor:
    """
    :param n: order of the matrix
    :return: orthogonal matrix with entries +-1/sqrt(n), shape (n, n), float64, on the
        CPU; cached and shared, not to be written to
    :raises ValueError: if no construction for order ``n`` is known here
    """
    factors = _kronecker_orders(n) if n >= 1 else None
    if factors is None:
        raise ValueError(
            f"No Hadamard matrix of order {n} is known: the order must be a product of "
            "2 and of Paley orders (12, 20, 28, 36, ...)"
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    sylvester = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    for factor in factors:
        matrix = torch.kron(sylvester if factor == 2 else _paley(factor), matrix)
    return matrix / sqrt(n)


@cache
def split_hadamard(n: int, block_size: int) -> tuple[int, int]:
    """
    Two Hadamard orders ``p, q`` with ``p * q = n``, for a Kronecker product of both after a
    block-diagonal matrix: the inner factor, of order q, becomes part of the blocks, and the
    outer one is applied to every q-th channel.

    :param n: a Hadamard order
    :param block_size: of the matrix before, whose blocks q divides or holds a multiple of
    :return: those of the fewest multiply-adds, ``n * (max(block_size, q) + p)``
    """
    pairs = [
        (n // q, q)
        for q in range(1, n + 1)
        if n % q == 0
        and (q % block_size == 0 or block_size % q == 0)
        and is_hadamard_order(q)
        and is_hadamard_order(n // q)
    ]
    if not pairs:
        raise ValueError(f"No Hadamard matrix of order {n} is known")
    return min(pairs, key=lambda pair: (max(block_size, pair[1]) + pair[0], pair))


def apply_hadamard(x: Tensor, matrix: Tensor, stride: int) -> Tensor:
    """
    Multiply channels which are ``stride`` apart by a matrix: ``(matrix kron I) x`` for each
    span of ``p * stride`` neighbours.

    :param x: shape (..., d), where ``p * stride`` divides d
    :param matrix: shape (p, p), of x's dtype
    :return: shape (..., d)
    """
    spans = x.unflatten(-1, (-1, matrix.shape[0], stride))
    return (matrix @ spans).flatten(-3)
