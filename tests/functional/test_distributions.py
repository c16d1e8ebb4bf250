# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch.distributions import Laplace, Normal

from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import concentration

DATA = {"normal": Normal(0.0, 1.0), "laplace": Laplace(0.0, 1.0)}


@pytest.mark.parametrize("distribution", DATA)
@pytest.mark.parametrize("size", [1, 2, 32, 576])
@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_are_those_of_random_data(distribution, size, symmetric):
    torch.manual_seed(0)
    x = DATA[distribution].sample((4_000_000 // size, size))
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    sampled = (x.square().sum(-1).mean() / width.square().mean()).item()
    expected = expected_concentration(distribution, size, symmetric)
    assert expected == pytest.approx(sampled, rel=0.01)


def test_exact_values_of_one_number():
    """The range is 2|x| if symmetric, else |x|"""
    assert expected_concentration("normal", 1, True) == pytest.approx(1 / 4, rel=1e-4)
    assert expected_concentration("laplace", 1, False) == pytest.approx(1, rel=1e-4)


def test_levels_of_groups_are_those_of_the_concentration_of_random_data():
    torch.manual_seed(0)
    args = QuantizationArgs(strategy="group", group_size=32)
    sampled = concentration(torch.randn(20_000, 256), args)
    assert expected_concentration("normal", 256, True, 32) == pytest.approx(sampled, rel=0.01)


def test_other_distributions_are_an_error():
    with pytest.raises(ValueError, match="normal, laplace"):
        expected_concentration("cauchy", 8, True)
