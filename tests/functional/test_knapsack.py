# SPDX-License-Identifier: Apache-2.0
from itertools import product
from random import Random

import pytest
import torch

from cat_modifier.functional.alignment import diagonal_blocks
from cat_modifier.functional.hadamard import is_hadamard_order
from cat_modifier.functional.knapsack import spend
from cat_modifier.functional.layout import Rotation, cheaper_layouts, choose_layout
from cat_modifier.functional.transform import compute_blocks, store_transform


@pytest.mark.parametrize("seed", range(20))
def test_spend_is_near_the_best_of_all_choices(seed):
    """If each option costs little of the budget, and larger costs gain less and less"""
    random = Random(seed)
    options = [
        [(cost, random.uniform(0.5, 2) / cost**0.5) for cost in (1, 2, 3, 4)] for _ in range(6)
    ]

    def total(indices, what: int) -> float:
        return sum(one[index][what] for one, index in zip(options, indices, strict=True))

    budget = 14
    chosen = spend(options, budget)
    assert total(chosen, 0) <= budget
    choices = product(range(4), repeat=6)
    best = min(total(one, 1) for one in choices if total(one, 0) <= budget)
    assert best <= total(chosen, 1) < 1.05 * best


def test_spend_takes_nothing_that_does_not_help():
    options = [[(1.0, 0.5), (2.0, 0.5), (3.0, 0.6)], [(2.0, 1.0), (1.0, 1.0)]]
    assert spend(options, 100) == [0, 1]


def test_what_cannot_be_paid():
    options = [[(1.0, 0.5)], [(2.0, 0.5), (3.0, 0.1)]]
    assert spend(options, 2.5) is None
    assert spend(options, 3) == [0, 0]


def cost_of(features: int):
    return lambda layout: layout.multiply_adds(features)


WIDTHS = [(576, 128), (1536, 512), (4096, 256), (14336, 128)]


@pytest.mark.parametrize("features, bound", WIDTHS)
@pytest.mark.parametrize("rotation", list(Rotation))
def test_cheaper_layouts(features, bound, rotation):
    largest = choose_layout("x", features, 1, bound, rotation)
    found = cheaper_layouts("x", features, 1, largest, rotation, cost_of(features))
    assert found[0] == largest
    # online Hadamard sizes: 112 after blocks of 128, 224 after blocks of 64
    assert len(found) > 1 or (features == 14336 and rotation is Rotation.HADAMARD)
    costs = [one.multiply_adds(features) for one in found]
    sizes = [one.block_size for one in found]
    assert costs == sorted(set(costs))[::-1] and sizes == sorted(set(sizes))[::-1]
    for one in found:
        assert largest.block_size % one.block_size == 0
        assert one.hadamard_size == largest.hadamard_size or rotation.is_fused
        assert is_hadamard_order(one.fused_hadamard_size) and is_hadamard_order(
            one.online_hadamard_size
        )


@pytest.mark.slow
@pytest.mark.parametrize("features", [576, 4096, 14336])
def test_cheaper_transforms_are_exact(features):
    generator = torch.Generator().manual_seed(0)
    largest = choose_layout("x", features, 1, 64, Rotation.HADAMARD)
    weight, x = torch.randn(2, 8, features, dtype=torch.float64, generator=generator)
    cost = cost_of(features)
    for layout in cheaper_layouts("x", features, 1, largest, Rotation.HADAMARD, cost):
        sx, sw = (diagonal_blocks(one, layout.block_size) for one in (x, weight))
        size = layout.stored_size
        stored = torch.empty(features // size, size, size, dtype=torch.bfloat16)
        blocks = compute_blocks(sx, sw, Rotation.HADAMARD, layout.fused_hadamard_size)
        transform = store_transform(blocks, layout, stored).invert()
        product = transform.transform_tokens(x) @ transform.transform_weight(weight).T
        assert torch.allclose(product, x @ weight.T)


def test_multiply_adds():
    """Blocks of 128, and an online Hadamard product of order 12"""
    layout = choose_layout("x", 1536, 1, 128, Rotation.HADAMARD)
    assert layout.multiply_adds(1536) == 1536 * (128 + 12)
    assert layout.multiply_adds(1536, are_blocks_fused=True) == 1536 * 12
    block = choose_layout("x", 1536, 1, 128, Rotation.BLOCK_HADAMARD)
    assert block.multiply_adds(1536) == 1536 * 128
