# SPDX-License-Identifier: Apache-2.0
"""Transform and quantization in C++, with each of the instructions that they are written for"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import INSTRUCTIONS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.stored import dequantize_blocks, store_blocks
from cat_modifier.functional.transform import apply_transform
from cat_modifier.kernels import cpu, native
from cat_modifier.kernels.reference import quantize_per_token

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ONE = torch.ones(1, 1)

# (blocks, size of a block, order of the matrix, interleave)
LAYOUTS = [
    (16, 128, 16, 128),
    (4, 144, 4, 144),
    (112, 128, 112, 128),  # of a matrix that is a product of two
    (12, 16, 12, 16),
    (3, 48, 1, 1),
    (7, 20, 4, 5),
    (24, 8, 48, 4),
    (5, 3, 1, 1),
    (60, 1, 60, 1),
]


def operands(layout, tokens: int, dtype: torch.dtype, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    count, size, order, _ = layout
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, count * size, generator=generator)
    x[:, :: count * size // 3] *= 30
    blocks = torch.randn(count, size, size, generator=generator) / size**0.5
    # entries that are exact in every dtype, as OnlineTransform has them
    hadamard = hadamard_matrix(order).sign().to(dtype) / 8 if order > 1 else None
    return x.to(dtype), blocks.to(dtype), hadamard


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@example(0, 16, 4, False, 0.0, None)
@example(70, 33, 8, True, 0.0, None)
@given(
    tokens=st.integers(0, 40),
    in_features=st.integers(1, 200),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 3.0, -1e4, 1e-30]),
    clip_ratio=st.sampled_from([None, 0.8]),
)
def test_quantization_is_exactly_the_reference(
    libraries, instructions, dtype, tokens, in_features, bits, symmetric, shift, clip_ratio
):
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(tokens, in_features, generator=generator) + shift
    x[:1] = 0
    x = x.to(dtype)
    ratio = None if clip_ratio is None else torch.tensor(clip_ratio)
    operator = libraries[instructions].transform_quantize_cpu
    q, scales, zero_points = operator(x, None, None, 1, bits, symmetric, ratio)
    expected = quantize_per_token(x, bits, symmetric, ratio)
    assert torch.equal(q, expected[0]) and torch.equal(scales, expected[1])
    if symmetric:
        assert zero_points.shape == (0, 1)
    else:
        assert torch.equal(zero_points, expected[2])


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rotates", [False, True])
def test_sums_are_those_of_float32(libraries, instructions, dtype, layout, rotates):
    x, blocks, hadamard = operands(layout, 7, dtype)
    hadamard = hadamard if rotates else None
    operator = libraries[instructions].transform_quantize_cpu
    q, scales, zero_points = operator(x, blocks, hadamard, layout[3], 8, False, None)
    exact = apply_transform(
        x.double(), blocks.double(), None if hadamard is None else hadamard.double(), layout[3]
    )
    expected = quantize_per_token(exact.float(), 8, False)
    torch.testing.assert_close(scales, expected[1], rtol=1e-5, atol=0)
    assert torch.equal(zero_points, expected[2])
    # a value halfway between two integers may round to the other
    different = q != expected[0]
    assert (q.int() - expected[0]).abs().max() <= 1 and different.float().mean() < 0.003


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_does_not_depend_on_its_batch(libraries, instructions, dtype, layout):
    x, blocks, hadamard = operands(layout, 75, dtype)
    operator = libraries[instructions].transform_quantize_cpu
    together = operator(x, blocks, hadamard, layout[3], 4, False, None)
    for part in (slice(0, 1), slice(3, 10), slice(40, 75)):
        alone = operator(x[part], blocks, hadamard, layout[3], 4, False, None)
        for one, all_ in zip(alone, together, strict=True):
            assert torch.equal(one, all_[part])


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_int8_gives_the_bits_of_floats(libraries, instructions, dtype, layout):
    x, blocks, hadamard = operands(layout, 35, dtype)
    integers = torch.empty_like(blocks, dtype=torch.int8)
    store_blocks(blocks.double(), integers)
    operator = libraries[instructions].transform_quantize_cpu
    floats = dequantize_blocks(integers, dtype)
    expected = operator(x, floats, hadamard, layout[3], 4, False, None)
    for tokens in (35, 19, 1):
        found = operator(x[:tokens], integers, hadamard, layout[3], 4, False, None)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other[:tokens])


@pytest.mark.parametrize("tokens", [3, 100])
def test_threads_do_not_change_a_bit(libraries, tokens):
    """No thread is made that vLLM has not bound to a core"""
    layout = (16, 128, 16, 128)
    x, blocks, hadamard = operands(layout, tokens, torch.bfloat16)
    operator = libraries["fastest"].transform_quantize_cpu
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.rand(2**20).exp()
            count = len(os.listdir("/proc/self/task"))
            found.append(operator(x, blocks, hadamard, layout[3], 4, False, None))
            assert len(os.listdir("/proc/self/task")) == count
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_no_number_after_it(
    libraries, instructions, symmetric, value
):
    x = torch.randn(3, 40)
    x[1, 37] = value
    operator = libraries[instructions].transform_quantize_cpu
    _, scales, _ = operator(x, None, None, 1, 4, symmetric, None)
    assert scales.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 40)}, "blocks and x differ"),
        ({"x": torch.zeros(3, 48, dtype=torch.bfloat16)}, "neither int8 nor of the dtype of x"),
        ({"x": torch.zeros(48, 3).T}, "must be contiguous"),
        ({"x": torch.zeros(48)}, "x is not a matrix"),
        ({"blocks": torch.zeros(3, 16, 4)}, "blocks and x differ"),
        ({"hadamard": torch.ones(5, 5)}, "matrix and x differ"),
        ({"hadamard": torch.ones(3, 1)}, "matrix and x differ"),
        ({"interleave": 0}, "interleave is not positive"),
        ({"clip_ratio": torch.ones(0)}, "clip_ratio is not one float32"),
        ({"clip_ratio": torch.ones(()).double()}, "clip_ratio is not one float32"),
        ({"hadamard": torch.ones(2, 2).half()}, "matrix and x differ in dtype"),
        ({"num_bits": 9}, "2 to 8 bits"),
        ({"x": torch.zeros(3, 48).double(), "blocks": None}, "float32, bfloat16 or float16"),
    ],
)
def test_operands_that_do_not_fit_are_refused(libraries, change, message):
    arguments = {
        "x": torch.zeros(3, 48),
        "blocks": torch.zeros(3, 16, 16),
        "hadamard": None,
        "interleave": 16,
        "num_bits": 4,
        "symmetric": False,
        "clip_ratio": None,
    }
    with pytest.raises(RuntimeError, match=message):
        libraries["fastest"].transform_quantize_cpu(**(arguments | change))


@pytest.mark.parametrize("stored", [torch.int8, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_compiler_pytorch_computes(monkeypatch, dtype, stored):
    x, blocks, hadamard = operands((16, 128, 16, 128), 5, dtype)
    blocks = (blocks * 200).to(stored or dtype)
    x[3, 7] = torch.inf
    arguments = (x, blocks, hadamard, 128, 8, False)
    assert native.why_unavailable() is None
    expected = cpu.transform_quantize(*arguments)
    monkeypatch.setattr(native, "why_unavailable", lambda: "no compiler")
    found = cpu.transform_quantize(*arguments)
    different = found[0] != expected[0]
    assert (found[0].int() - expected[0]).abs().max() <= 1 and different.float().mean() < 0.003
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0, equal_nan=True)
    assert found[1].isnan().flatten().tolist() == [False, False, False, True, False]
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("order", [148, 512])
def test_large_orders_are_multiplied_by_onednn(order):
    x, blocks, hadamard = operands((order, 16, order, 16), 3, torch.float32)
    assert cpu._is_large(order) and not cpu._is_large(112)
    found = cpu.transform_quantize(x, blocks, hadamard, 16, 8, False)
    exact = apply_transform(x.double(), blocks.double(), hadamard.double(), 16)
    expected = quantize_per_token(exact.float(), 8, False)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
    assert (found[0].int() - expected[0]).abs().max() <= 1


def test_the_library_in_the_cache_is_used_if_it_is_whole(tmp_path):
    def load() -> bytes:
        script = "from cat_modifier.kernels import native; native.load('cat_test_cached')"
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
        return next(tmp_path.glob("cat_modifier/*.so")).read_bytes()

    before = load()
    (lock,) = tmp_path.glob("cat_modifier/*.lock")
    lock.unlink()
    assert load() == before
    assert not lock.exists()  # whose folder may be read-only
    next(tmp_path.glob("cat_modifier/*.so")).write_bytes(b"")
    assert load() == before
