# SPDX-License-Identifier: Apache-2.0
"""
Normalised Hadamard matrices and their product with activations.

A Hadamard matrix of order ``n`` has entries ``+-1/sqrt(n)`` and orthogonal rows. A
checkpoint stores the order and never the matrix: every reader must rebuild the same one.
The matrices are therefore part of the checkpoint format, whose specification is in
``cat_modifier/README.md``, and must never change.

Orders are products of 2 and of the orders ``q + 1`` and ``2(q + 1)`` of Paley's
constructions over prime fields (R. Paley, "On orthogonal matrices", 1933). They cover
the widths of current models: 576 = 2^4 * 36, 1536 = 2^7 * 12, 14336 = 2^9 * 28, ...
"""

from functools import cache, lru_cache
from math import isqrt, prod, sqrt

import torch
from torch import Tensor

__all__ = [
    "apply_hadamard",
    "hadamard_matrix",
    "is_hadamard_order",
    "largest_hadamard_order",
    "split_hadamard",
    "without_twos",
]


_MAX_PALEY_ORDER = 256
"""Largest Paley factor. Part of the format: it decides which factors an order has"""


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
    """Factor n into 2 and Paley orders, the innermost first; None if n has no such factors"""
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


def without_twos(n: int) -> int:
    """
    Find the order of the factor of ``hadamard_matrix(n)`` that is not Sylvester's.

    :param n: any order; one without a matrix has no other factor
    """
    factors = _kronecker_orders(n)
    return n if factors is None else prod(factor for factor in factors if factor != 2)


def largest_hadamard_order(n: int) -> int:
    """Find the largest divisor of ``n`` that is a Hadamard order, possibly 1"""
    return next(m for m in range(n, 0, -1) if n % m == 0 and is_hadamard_order(m))


def _paley(n: int) -> Tensor:
    """Build Paley's Hadamard matrix of order n, entries +-1, shape (n, n), float64"""
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
    if first:  # C is skew-symmetric
        return identity + conference
    # C is symmetric: each entry becomes a block of 2 x 2
    ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    zeros = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(conference, ones) + torch.kron(identity, zeros)


@lru_cache(maxsize=32)
def hadamard_matrix(n: int) -> Tensor:
    """
    Build the Hadamard matrix of an order.

    :param n: order of the matrix
    :return: orthogonal matrix with entries +-1/sqrt(n), shape (n, n), float64, on the
        CPU. Cached and shared: do not write to it
    :raises ValueError: if no construction of order ``n`` is known here
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
    Split a Hadamard order n into an online part p and a fused part q.

    The fused part is part of the blocks. The online part multiplies channels that are q
    apart. Together they are one Hadamard product over ``n = p * q`` channels.

    :param n: a Hadamard order
    :param block_size: k, size of the blocks; q divides k, or k divides q
    :return: the p and q with the fewest multiply-adds, ``n * (max(k, q) + p)``
    :raises ValueError: if n is no known Hadamard order
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


def apply_hadamard(x: Tensor, matrix: Tensor, interleave: int) -> Tensor:
    """
    Multiply channels that are ``interleave`` apart by a matrix.

    Each span of ``p * interleave`` neighbouring channels becomes ``(matrix kron I) x``.

    :param x: shape (..., d), where ``p * interleave`` divides d
    :param matrix: shape (p, p), dtype of x
    :param interleave: distance of the channels that the matrix multiplies
    :return: shape (..., d)
    """
    spans = x.unflatten(-1, (-1, matrix.shape[0], interleave))
    return (matrix @ spans).flatten(-3)
