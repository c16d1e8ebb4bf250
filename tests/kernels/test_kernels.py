# SPDX-License-Identifier: Apache-2.0
"""
The kernels compared with float64: CPU kernels, and Triton kernels on a GPU, or in its
interpreter where there is none
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.stored import dequantize_blocks, store_blocks
from cat_modifier.functional.transform import apply_transform
from cat_modifier.kernels import cpu, ops, triton
from cat_modifier.kernels.reference import quantize_per_token

KERNELS = {"cpu": cpu, "triton": triton}
DEVICES = {"cpu": "cpu", "triton": GPU}


def inputs(tokens, count, size, order, interleave, dtype, outliers, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, count * (size or 1), generator=generator)
    if outliers:
        x[:, :: max(1, x.shape[1] // 3)] *= 1000
        x[::2] *= 1e-3
    blocks = None
    if size is not None:
        blocks = torch.randn(count, size, size, generator=generator) / size**0.5
        blocks = blocks.bfloat16().to(dtype)
    hadamard = hadamard_matrix(order).float() if order > 1 else None
    online = ops.OnlineTransform(blocks, hadamard, interleave, dtype).to(device)
    return x.to(device, dtype), online, None if hadamard is None else hadamard.to(device)


def reference(x, bits, symmetric, clip_ratio=None):
    """What a CPU computes: PyTorch divides by numbers less exactly on GPUs"""
    ratio = None if clip_ratio is None else clip_ratio.cpu()
    found = quantize_per_token(x.cpu(), bits, symmetric, ratio)
    return tuple(None if one is None else one.to(x.device) for one in found)


def dequantize(q, scales, zero_points):
    return (q.double() - (0 if zero_points is None else zero_points)) * scales.double()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item()


# (blocks, size of a block, order of H, interleave); without blocks: (channels, None, ...)
LAYOUTS = [
    (6, 96, 12, 48),
    (12, 16, 1, 1),
    (3, 48, 1, 1),
    (2, 256, 2, 256),
    (16, 32, 4, 32),  # four spans
    (7, 20, 1, 1),
    (24, 8, 48, 4),
    (192, None, 12, 16),
    (96, None, 4, 8),
    (512, None, 256, 1),
]

RATIO = torch.tensor(0.8)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_transform_is_as_exact_as_plain_pytorch(kernels, layout, tokens, dtype):
    device = DEVICES[kernels]
    x, online, hadamard = inputs(tokens, *layout, dtype, tokens == 33, device=device)
    interleave = layout[3]
    expected = apply_transform(x.double(), online.weight, hadamard, interleave)
    plain = apply_transform(x, online.weight, hadamard, interleave)
    allowed = 2 * error(plain, expected)
    out = KERNELS[kernels].transform(x, online.weight, online.hadamard, interleave)
    assert out.dtype == dtype
    # GPUs add up the channels one after the other, PyTorch in parts
    least = 1e-7 if device == "cpu" else 4e-7
    assert error(out.double() * online.norm_scale, expected) <= max(allowed, least)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", [*LAYOUTS[:7], (1, 288, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_int8_blocks_are_multiplied_as_floats(kernels, layout, dtype):
    x, online, _ = inputs(33, *layout, dtype, False, device=DEVICES[kernels])
    kernels, interleave = KERNELS[kernels], layout[3]
    integers = torch.empty_like(online.weight, dtype=torch.int8)
    store_blocks(online.weight.detach().double(), integers)
    floats = dequantize_blocks(integers, dtype)
    found = kernels.transform(x, integers, online.hadamard, interleave)
    expected = kernels.transform(x, floats, online.hadamard, interleave)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    arguments = (online.hadamard, interleave, 4, False)
    found = kernels.transform_quantize(x, integers, *arguments)
    expected = kernels.transform_quantize(x, floats, *arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(
    "bits, symmetric, clip_ratio",
    [
        (4, False, None),
        (4, True, None),
        (8, False, None),
        (8, True, None),
        (4, False, RATIO),
    ],
)
def test_transformed_inputs_are_quantized_like_exact_ones(
    kernels, layout, tokens, bits, symmetric, clip_ratio
):
    device, interleave = DEVICES[kernels], layout[3]
    x, online, hadamard = inputs(
        tokens, *layout, torch.bfloat16, outliers=tokens == 40, device=device
    )
    clip_ratio = None if clip_ratio is None else clip_ratio.to(device)
    exact = apply_transform(x.double(), online.weight, hadamard, interleave)
    q, scales, zero_points = KERNELS[kernels].transform_quantize(
        x, online.weight, online.hadamard, interleave, bits, symmetric, clip_ratio
    )
    assert q.shape == x.shape and q.dtype == torch.int8
    assert scales.shape == (tokens, 1) and scales.dtype == torch.float32
    assert (zero_points is None) == symmetric
    found = dequantize(q, scales * online.norm_scale, zero_points)
    # the error of quantizing exact values, and of rounding to bfloat16
    allowed = dequantize(*reference(exact, bits, symmetric, clip_ratio))
    assert error(found, exact) < 1.02 * error(allowed, exact) + 0.006


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@example(1, 1, 4, False, 0.0, None)
@given(
    tokens=st.integers(1, 20),
    in_features=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 3.0, -1e4, 1e-30]),
    clip_ratio=st.sampled_from([None, RATIO]),
)
def test_quantization_without_a_transform_is_exactly_the_reference(
    kernels, dtype, tokens, in_features, bits, symmetric, shift, clip_ratio
):
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(tokens, in_features, generator=generator) + shift
    x[0] = 0 if shift else 1e30
    x = x.to(DEVICES[kernels], dtype)
    clip_ratio = None if clip_ratio is None else clip_ratio.to(x.device)
    found = KERNELS[kernels].quantize(x, bits, symmetric, clip_ratio)
    expected = reference(x, bits, symmetric, clip_ratio)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("layout", [None, (3, 16, 1, 1), (3, 16, 4, 12)], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_token_that_is_not_finite_is_no_number_after_it(layout, symmetric, value):
    x, online, _ = inputs(3, *(layout or (48, None, 1, 1)), torch.float32, False, device=GPU)
    x[1, 37] = value
    arguments = (online.weight, online.hadamard, online.interleave, 4, symmetric)
    _, scales, _ = triton.transform_quantize(x, *arguments)
    assert scales.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("device", sorted({"cpu", GPU}))
@pytest.mark.parametrize("is_contiguous", [True, False])
def test_operators_have_fakes_and_can_be_compiled(device, is_contiguous):
    x, online, _ = inputs(5, 6, 96, 12, 48, torch.bfloat16, False, device=device)
    if not is_contiguous:
        x = x.T.contiguous().T
    arguments = (x, online.weight, online.hadamard, 48)
    tests = ("test_schema", "test_faketensor")
    namespace = torch.ops.cat_modifier
    torch.library.opcheck(namespace.transform, arguments, test_utils=tests)
    for symmetric, clip_ratio in ((True, None), (False, RATIO.to(device))):
        format = (4, symmetric, clip_ratio)
        arguments = (*arguments[:4], *format)
        torch.library.opcheck(namespace.transform_quantize, arguments, test_utils=tests)
        torch.library.opcheck(namespace.quantize, (x, *format), test_utils=tests)
    compiled = torch.compile(lambda x: online.quantize(x, 4, False), fullgraph=True)
    for found, expected in zip(compiled(x), online.quantize(x, 4, False), strict=True):
        assert torch.equal(found, expected)


def test_layers_which_are_alike_are_warmed_up_once(monkeypatch):
    monkeypatch.setattr(ops, "_warm", set())
    calls = []
    monkeypatch.setattr(
        cpu, "transform_quantize", lambda *args: calls.append(args) or (args[0],) * 3
    )
    for layout, bits in (((6, 96, 1, 1), 4), ((6, 96, 12, 48), 4), ((6, 96, 12, 48), 8)):
        for seed in range(3):
            x, online, _ = inputs(1, *layout, torch.bfloat16, False, seed)
            ops.warm_up(x, bits, False, online)
    assert len(calls) == 3 * len(ops._WARM_UP_TOKENS["cpu"])


def test_blocks_which_the_dtype_cannot_hold_are_applied_in_float32():
    blocks = torch.randn(2, 16, 16)
    x = torch.randn(3, 32).bfloat16()
    online = ops.OnlineTransform(blocks, None, 1, torch.bfloat16)
    assert online.weight.dtype == torch.float32
    assert torch.equal(online(x), apply_transform(x.float(), blocks).bfloat16())
    assert ops.OnlineTransform(blocks.bfloat16(), None, 1, torch.half).dtype == torch.half
    assert ops.OnlineTransform(blocks.half(), None, 1, torch.bfloat16).dtype == torch.float32


def test_tensors_are_parameters_and_buffers():
    x, online, _ = inputs(3, 6, 96, 12, 48, torch.bfloat16, False)
    online = ops.OnlineTransform(online.weight.data, online.hadamard, 48, x.dtype, 0.8)
    names = {name for name, _ in (*online.named_parameters(), *online.named_buffers())}
    assert names == {"weight", "hadamard", "clip_ratio"}
    before = online(x), online.quantize(x, 4, False)[1]
    for name in names:
        changed = torch.func.functional_call(online, {name: getattr(online, name) / 2}, x)
        assert not torch.equal(changed, before[0]), name
        getattr(online, name).data.div_(2)
        assert not torch.equal(online.quantize(x, 4, False)[1], before[1]), name
        getattr(online, name).data.mul_(2)


@pytest.mark.parametrize("blocks, hadamard", [(True, True), (False, True), (False, False)])
def test_clipping_before_quantization_equals_clipping_within(blocks, hadamard):
    layout = (6 if blocks else 576, 96 if blocks else None, 12 if hadamard else 1, 48)
    x, online, matrix = inputs(7, *layout, torch.float32, False)
    arguments = (online.weight, matrix, 48, torch.float32)
    online, unclipped = ops.OnlineTransform(*arguments, 0.8), ops.OnlineTransform(*arguments)
    outside = online(x)
    assert outside.abs().max() < 0.9 * unclipped(x).abs().max()
    within, before = online.quantize(x, 4, False), ops.quantize(outside, 4, False)
    assert torch.equal(within[0], before[0])
    assert torch.allclose(within[1], before[1]) and torch.equal(within[2], before[2])


def test_no_tokens_are_no_error():
    for name, kernels in KERNELS.items():
        x, online, _ = inputs(0, 6, 96, 12, 48, torch.bfloat16, False, device=DEVICES[name])
        arguments = (x, online.weight, online.hadamard, 48)
        assert kernels.transform(*arguments).shape == x.shape
        assert kernels.transform_quantize(*arguments, 4, False)[0].shape == x.shape
        assert kernels.quantize(x, 4, True)[1].shape == (0, 1)


def test_triton_kernels_compile_for_gpus_and_fit_in_their_shared_memory():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).parent / "compile_for_gpus.py")
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == 3 * 15
    smallest = 99 * 1024  # Ada, the smallest of these GPUs
    assert all(memory < smallest for *_, memory in kernels), kernels
