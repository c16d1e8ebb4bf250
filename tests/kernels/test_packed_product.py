# SPDX-License-Identifier: Apache-2.0
"""The product of packed 4-bit weights, with each of the instructions it is written for"""

import os
import subprocess

import pytest
import torch
from conftest import INSTRUCTIONS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cat_modifier.kernels import native, packed


@pytest.fixture(scope="module")
def products(libraries) -> dict:
    """The operator, once for each kind of instructions"""
    return {name: library.packed_product for name, library in libraries.items()}


def ones(size: int) -> torch.Tensor:
    return torch.ones(size, 1)


def check(product, x, weight, zero_point=None):
    """Check a product without scales, whose float32 result is exact, against int64"""
    correction = weight.sum(1, dtype=torch.float32)[None]
    out = product(
        x,
        ones(len(x)),
        zero_point,
        packed.pack(weight),
        ones(len(weight)),
        None if zero_point is None else correction,
        None,
        torch.float32,
    )
    shifted = x.long() - (0 if zero_point is None else zero_point)
    assert torch.equal(out.long(), shifted @ weight.long().T)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(1, 1, 1, 4, False, 0)
@example(13, 8, 32, 8, True, 0)  # two tiles
@example(300, 8000, 33, 4, True, 0)  # blocks of tokens, one channel more than a panel
@given(
    tokens=st.integers(0, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 130),
    bits=st.sampled_from([4, 8]),
    has_zero_points=st.booleans(),
    seed=st.integers(0, 9),
)
def test_sums_are_exact(
    products, instructions, tokens, inputs, outputs, bits, has_zero_points, seed
):
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (bits - 1)
    x = torch.randint(-limit, limit, (tokens, inputs), generator=generator).to(torch.int8)
    weight = torch.randint(-8, 8, (outputs, inputs), generator=generator).to(torch.int8)
    zero_point = torch.randint(-limit, limit, (tokens, 1), generator=generator).int()
    check(products[instructions], x, weight, zero_point if has_zero_points else None)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("code", [-8, -1, 7])
@pytest.mark.parametrize("activation", [-128, 127, 7])
def test_sums_of_extreme_integers_do_not_overflow(products, instructions, code, activation):
    inputs = 14336
    x = torch.full((7, inputs), activation, dtype=torch.int8)
    check(products[instructions], x, torch.full((40, inputs), code, dtype=torch.int8))


def test_no_kind_of_instructions_changes_a_bit(products):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (83, 501), generator=generator).to(torch.int8)
    x = torch.randint(-8, 8, (37, 501), generator=generator).to(torch.int8)
    scale = torch.rand(37, 1, generator=generator) + 0.01
    weight_scale = torch.rand(83, 1, generator=generator) + 0.01
    zero_point = torch.randint(-8, 8, (37, 1), generator=generator).int()
    correction = (weight.sum(1, dtype=torch.float32) * weight_scale[:, 0])[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = torch.randn(83, generator=generator).to(dtype)
        operands = (x, scale, zero_point, packed.pack(weight), weight_scale, correction, bias)
        first, *others = (product(*operands, dtype) for product in products.values())
        expected = (x.double() - zero_point) @ weight.double().T * scale * weight_scale.T + bias
        assert (first.double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()
        assert first.dtype == dtype and all(torch.equal(first, other) for other in others)


def test_threads_are_those_of_torch(products):
    """No thread is made that vLLM has not bound to a core"""
    weight = torch.randint(-8, 8, (2048, 2048)).to(torch.int8)
    x = torch.randint(-8, 8, (3, 2048)).to(torch.int8)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.rand(2**20).exp()
            count = len(os.listdir("/proc/self/task"))
            arguments = (x, ones(3), None, packed.pack(weight), ones(2048), None, None)
            found.append(products["fastest"](*arguments, torch.float32))
            assert len(os.listdir("/proc/self/task")) == count
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_operator_has_a_fake_and_can_be_compiled(products):
    product = products["fastest"]
    weight = torch.randint(-8, 8, (48, 40)).to(torch.int8)
    x = torch.randint(-8, 8, (5, 40)).to(torch.int8)
    arguments = (x, ones(5), None, packed.pack(weight), ones(48), None, None, torch.bfloat16)
    torch.library.opcheck(product, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *args: product(*args) + 1, fullgraph=True)
    assert torch.equal(compiled(*arguments), product(*arguments) + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 48, dtype=torch.int8)}, "weight and x differ"),
        ({"weight_scale": ones(70)}, "weight and its scale differ"),
        ({"bias": torch.zeros(64)}, "bias and output differ in dtype"),
        ({"x": torch.zeros(40, 3, dtype=torch.int8).T}, "must be contiguous"),
        ({"dtype": torch.float64}, "returns float32, bfloat16 or float16"),
    ],
)
def test_operands_that_do_not_fit_are_refused(products, change, message):
    arguments = {
        "x": torch.zeros(3, 40, dtype=torch.int8),
        "scale": ones(3),
        "zero_point": None,
        "weight": packed.pack(torch.zeros(64, 40, dtype=torch.int8)),
        "weight_scale": ones(64),
        "correction": None,
        "bias": None,
        "dtype": torch.bfloat16,
    }
    with pytest.raises(RuntimeError, match=message):
        products["fastest"](**(arguments | change))


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="no-such-compiler"):
        native.load("cat_test_without")
    assert "no-such-compiler" in native.why_unavailable.__wrapped__()
    monkeypatch.setenv("CXX", "g++ --no-such-option")
    with pytest.raises(subprocess.CalledProcessError):
        native.load("cat_test_without")
    assert "no-such-option" in native.why_unavailable.__wrapped__()
