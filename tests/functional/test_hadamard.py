# SPDX-License-Identifier: Apache-2.0
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
def test_the_inner_factor_suits_the_blocks(span, block_size, expected):
    assert split_hadamard(span, block_size) == expected


@pytest.mark.parametrize("width, size, stride", [(576, 12, 48), (1536, 24, 32), (64, 4, 1)])
def test_product_is_that_of_the_kronecker_matrix_on_each_span(width, size, stride):
    x = torch.randn(2, 3, width, dtype=torch.float64)
    matrix = hadamard_matrix(size)
    span = torch.kron(matrix, torch.eye(stride, dtype=torch.float64))
    expected = x @ torch.block_diag(*[span] * (width // span.shape[0])).T
    assert torch.allclose(apply_hadamard(x, matrix, stride), expected)


@pytest.mark.parametrize("block_size", [1, 8, 24, 96])
def test_both_factors_together_are_a_hadamard_matrix_of_the_whole(block_size):
    outer, inner = split_hadamard(96, block_size)
    size = max(block_size, inner)
    ones = torch.eye(block_size, dtype=torch.float64).expand(96 // block_size, -1, -1)
    blocks = rotate_blocks(ones, ones, Rotation.HADAMARD, inner)
    assert blocks.shape == (96 // size, size, size)
    rows = apply_blocks(torch.eye(96, dtype=torch.float64), blocks)
    matrix = apply_hadamard(rows, hadamard_matrix(outer), inner)
    assert torch.allclose(matrix @ matrix.T, torch.eye(96, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, 96**-0.5))
