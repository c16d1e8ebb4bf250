# SPDX-License-Identifier: Apache-2.0
"""Weights of tokens by what the output of a module feels"""

import pytest
import torch
from torch.nn import Linear, Module

from cat_modifier.calibration.sensitivity import weighted_inputs

TOKENS, SIZE = 6, 16


class Mixing(Module):
    """Attention with fixed probabilities"""

    def __init__(self):
        super().__init__()
        self.value, self.gate = Linear(SIZE, SIZE), Linear(SIZE, SIZE)
        self.output = Linear(SIZE, SIZE)
        torch.manual_seed(0)
        self.mix = torch.rand(TOKENS, TOKENS).tril()

    def forward(self, x, attention_mask=None):
        mixed = self.mix @ self.value(x)
        self.gate(x)
        return self.output(mixed), None


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Mixing()


def weights_of(module, scales=None, count=400) -> dict[str, torch.Tensor]:
    x = torch.randn(1, TOKENS, SIZE)
    linears = {name: one for name, one in module.named_modules() if isinstance(one, Linear)}
    sums: dict[str, torch.Tensor] = {}
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            calls = weighted_inputs(module, (x,), {}, linears, scales, generator)
        for name, _, weights in calls:
            sums[name] = sums.get(name, 0) + weights[0] / count
    return sums


def test_weights_are_the_squared_norms_of_jacobians(module):
    found = weights_of(module)
    squares = module.output.weight.square().sum() * module.mix.square().sum(0)
    assert torch.allclose(found["value"], squares, rtol=0.1)
    # one gradient for all Linears that read an input, also for those that nothing depends on
    assert torch.equal(found["gate"], found["value"])
    assert torch.allclose(found["output"], torch.full((TOKENS,), float(SIZE)), rtol=0.1)


def test_errors_count_in_proportion_to_the_scales(module):
    scales = torch.zeros(1, TOKENS, 1)
    scales[0, 2] = 3
    found = weights_of(module, scales)
    squares = 9 * module.output.weight.square().sum() * module.mix[2].square()
    assert torch.allclose(found["value"], squares, rtol=0.15)
    assert found["output"][2] > 0 and found["output"].count_nonzero() == 1


def test_the_module_is_left_as_it_was(module):
    x = torch.randn(1, TOKENS, SIZE)
    before = module(x)[0]
    with torch.no_grad():
        weighted_inputs(module, (x,), {}, {"value": module.value}, None, torch.Generator())
    assert torch.equal(module(x)[0], before)
    assert all(one.grad is None for one in module.parameters())
    assert not module.value._forward_hooks


def test_inputs_are_those_of_the_calls(module):
    x = torch.randn(1, TOKENS, SIZE)
    linears = {"value": module.value, "output": module.output}
    with torch.no_grad():
        value, output = weighted_inputs(module, (x,), {}, linears, None, torch.Generator())
    assert value.x is x
    assert not output.x.requires_grad
    assert torch.allclose(output.x, module.mix @ module.value(x))
