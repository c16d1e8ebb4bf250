# SPDX-License-Identifier: Apache-2.0
import hashlib
from math import isqrt, sqrt

import numpy as np
import pytest
import torch

from cat_modifier.functional.hadamard import (
    apply_hadamard,
    hadamard_matrix,
    is_hadamard_order,
    largest_hadamard_order,
    split_hadamard,
)
from cat_modifier.functional.layout import Rotation, choose_layout
from cat_modifier.functional.transform import apply_blocks, rotate_blocks

# input sizes of Linears in released models
WIDTHS = [
    576,
    896,
    1536,
    2048,
    3072,
    4096,
    4864,
    5120,
    8192,
    8960,
    9728,
    14336,
    18944,
    28672,
]


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 40, 48, 72, 76, 108, 148, 576])
def test_matrix_is_orthogonal_with_entries_of_one_magnitude(order):
    matrix = hadamard_matrix(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))


@pytest.mark.parametrize("order", [3, 6, 9, 10, 0, -4])
def test_unknown_order_is_an_error(order):
    assert order < 1 or not is_hadamard_order(order)
    with pytest.raises(ValueError, match="No Hadamard matrix"):
        hadamard_matrix(order)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bound", [32, 64, 128])
def test_little_is_left_to_do_after_the_blocks_of_released_models(width, bound):
    layout = choose_layout("a", width, 1, bound, Rotation.HADAMARD)
    assert layout.online_hadamard_size * layout.fused_hadamard_size == width
    assert layout.stored_size <= 256
    assert layout.online_hadamard_size + layout.stored_size < 3 * width**0.5 + bound


@pytest.mark.parametrize("n, expected", [(576, 576), (288, 288), (11008, 256), (27, 1), (6, 2)])
def test_largest_order(n, expected):
    assert largest_hadamard_order(n) == expected


@pytest.mark.parametrize("span, block_size, expected", [(576, 96, (12, 48)), (64, 1, (8, 8))])
def test_the_fused_part_suits_the_blocks(span, block_size, expected):
    assert split_hadamard(span, block_size) == expected


@pytest.mark.parametrize("width, size, interleave", [(576, 12, 48), (1536, 24, 32), (64, 4, 1)])
def test_product_is_that_of_the_kronecker_matrix_on_each_span(width, size, interleave):
    x = torch.randn(2, 3, width, dtype=torch.float64)
    matrix = hadamard_matrix(size)
    span = torch.kron(matrix, torch.eye(interleave, dtype=torch.float64))
    expected = x @ torch.block_diag(*[span] * (width // span.shape[0])).T
    assert torch.allclose(apply_hadamard(x, matrix, interleave), expected)


@pytest.mark.parametrize("block_size", [1, 8, 24, 96])
def test_both_parts_together_are_a_hadamard_matrix_of_the_whole(block_size):
    online, fused = split_hadamard(96, block_size)
    size = max(block_size, fused)
    ones = torch.eye(block_size, dtype=torch.float64).expand(96 // block_size, -1, -1)
    blocks = rotate_blocks(ones, ones, Rotation.HADAMARD, fused)
    assert blocks.shape == (96 // size, size, size)
    rows = apply_blocks(torch.eye(96, dtype=torch.float64), blocks)
    matrix = apply_hadamard(rows, hadamard_matrix(online), fused)
    assert torch.allclose(matrix @ matrix.T, torch.eye(96, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 96**-0.5))


# ---- the construction is part of the checkpoint format: it never changes -------------------

SIGNS = {
    # order: SHA-256 of the signs, row by row, one byte each: 0x01 for +, 0xff for -
    1: "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a",
    2: "ae0c359ec39763b63fab5028b9c20bdc187b02cf0b81eed343de9b44a84c32c1",
    4: "14edb060b895542e36542bfe57c990c3ab60c74c6ded991c127ff28bf669f4aa",
    12: "db7478025ce74776a8a2669368885b71737288dabf1e23985366a367b4f78ab9",
    20: "d04b560308676ee7cb59dd0f11653ead6c5f5efcbe97f1b57fe11bd39ee46faa",
    28: "a24c9c5912c711a9bad9f9a9ee25a5fa088b3effa4e660143e5272d3fe4290b1",
    36: "1a7aed2f42a8c71de2ae13e765a6df2c2023519ef899b00d5d0baa7ee26f341b",
    64: "4be469934f00a70b701ba4d1d2f489d817feb9fce017ad0decb3433bb851aae0",
    96: "ae5fe57f333d98f079da24ef51ba861f95ffe90c0a4b64a278bf8f92550af70a",
    128: "6c75072bc838cd31cf9d36107ed40203803153bb786269c7ef3e53e17ba46fee",
    144: "f5196bac92c7a6801aec2122c723e45ad62f68bf550d863828ff96399e6f4ee2",
    148: "1a8964dfe75c61f5113b1c7a953a939daecaa628da6f83156e29b9059eec94ed",
    576: "4fc7e4b139b2557537645e5ce9d5bf0d5edb9ca257a1769bb9754ea4d33ea1bc",
    720: "1348587575e3d63233d823515788d6400ea247aabccd565d77fd23ac549833f6",
    896: "543f15ab70a95944416302e91be45e1873566266a59070e9b08c8b75f83e16fe",
    1536: "d09d838f4ea29a734f554076792989860cabbfaad7c950d3b24a266b0cb10338",
}


def digest(matrix: torch.Tensor) -> str:
    return hashlib.sha256(matrix.sign().to(torch.int8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("order", SIGNS)
def test_signs_never_change(order):
    matrix = hadamard_matrix(order)
    assert digest(matrix) == SIGNS[order]
    if order > 1:  # other valid Hadamard matrices of the same order
        assert digest(matrix.roll(1, 0)) != SIGNS[order]
        assert digest(-matrix) != SIGNS[order]


def specified_hadamard(n: int) -> np.ndarray | None:
    """Build the matrix by the text of the specification in cat_modifier/README.md alone"""

    def is_prime(q: int) -> bool:
        return q >= 2 and all(q % i for i in range(2, isqrt(q) + 1))

    def paley(m: int) -> np.ndarray | None:
        for kind, q, remainder in ((1, m - 1, 3), (2, m // 2 - 1, 1)):  # noqa: B007
            if m % 4 == 0 and is_prime(q) and q % 4 == remainder:
                break
        else:
            return None
        residues = {i * i % q for i in range(1, q)}
        c = np.zeros((q + 1, q + 1), dtype=int)
        c[0, 1:] = 1
        c[1:, 0] = -1 if kind == 1 else 1
        for i in range(q):
            for j in range(q):
                if i != j:
                    c[1 + i, 1 + j] = 1 if (i - j) % q in residues else -1
        one = np.eye(q + 1, dtype=int)
        if kind == 1:
            return one + c
        return np.kron(c, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])

    def factors(m: int) -> list[np.ndarray] | None:
        if m == 1:
            return []
        if m % 2:
            return None
        if (others := factors(m // 2)) is not None:
            return [np.array([[1, 1], [1, -1]]), *others]
        for f in range(12, min(m, 256) + 1, 4):
            if m % f == 0 and (first := paley(f)) is not None:
                if (others := factors(m // f)) is not None:
                    return [first, *others]
        return None

    if (found := factors(n)) is None:
        return None
    signs = np.ones((1, 1), dtype=int)
    for factor in found:
        signs = np.kron(factor, signs)
    return signs / sqrt(n)


@pytest.mark.slow
@pytest.mark.parametrize("orders", [range(1, 513), [576, 720, 1200, 1248, 1536, 1584]])
def test_the_specification_is_enough_to_build_them(orders):
    known = 0
    for order in orders:
        expected = specified_hadamard(order)
        assert (expected is not None) == is_hadamard_order(order)
        if expected is not None:
            known += 1
            assert np.array_equal(hadamard_matrix(order).numpy(), expected)
    assert known >= 6
