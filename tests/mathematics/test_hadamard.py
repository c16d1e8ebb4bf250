# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from cat_modifier.mathematics.hadamard import (
    apply_hadamard,
    hadamard_factors,
    hadamard_matrix,
    is_hadamard_order,
    largest_hadamard_order,
)

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
def test_widths_of_released_models_are_orders_with_balanced_factors(width):
    left, right = hadamard_factors(width)
    assert left * right == width
    assert max(left, right) <= 12 * min(left, right)


@pytest.mark.parametrize("n, expected", [(576, 576), (288, 288), (11008, 256), (27, 1), (6, 2)])
def test_largest_order(n, expected):
    assert largest_hadamard_order(n) == expected


@pytest.mark.parametrize("width, span", [(576, 576), (1536, 768), (64, 16)])
def test_product_is_that_of_the_kronecker_matrix_on_each_span(width, span):
    x = torch.randn(2, 3, width, dtype=torch.float64)
    left, right = (hadamard_matrix(order) for order in hadamard_factors(span))
    matrix = torch.block_diag(*[torch.kron(left, right)] * (width // span))
    assert torch.allclose(apply_hadamard(x, left, right), x @ matrix.T)
