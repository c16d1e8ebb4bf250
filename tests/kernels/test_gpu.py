# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU, at sizes that its interpreter would take too long for"""

import pytest
import torch
from conftest import GPU
from test_kernels import dequantize, error, reference

from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.layout import Rotation, choose_layout
from cat_modifier.functional.stored import dequantize_blocks, store_blocks
from cat_modifier.functional.transform import apply_transform
from cat_modifier.kernels import ops
from cat_modifier.kernels.reference import quantize_per_token

pytestmark = pytest.mark.skipif(GPU == "cpu", reason="needs a GPU")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 17, 300, 1500]
"""For each way to launch the kernels"""

# (channels, size of a block)
SMALL = [
    (576, 64),
    (576, 576),  # larger than our kernels
    (1536, 96),
    (3072, 192),
]
LARGE = [(1536, 16), (8192, 256), (8960, 128), (14336, 128)]
CASES = [(*one, dtype) for one in SMALL for dtype in DTYPES]
CASES += [(*one, torch.bfloat16) for one in LARGE]


def inputs(tokens, channels, size, rotation, dtype, stored=None, clip_ratio=1.0):
    """
    :param stored: dtype of T; None for that of the input
    :return: tokens with outliers, and a transform with the layout that CATModifier chooses
    """
    generator = torch.Generator(GPU).manual_seed(channels + size)
    x = torch.randn(tokens, channels, generator=generator, device=GPU)
    x[:, :: channels // 3] *= 30
    layout = choose_layout("x", channels, 1, size, rotation)
    size = layout.stored_size
    shape = (channels // size, size, size)
    blocks = torch.empty(shape, device=GPU, dtype=stored or dtype)
    exact = torch.randn(shape, generator=generator, device=GPU, dtype=torch.float64)
    store_blocks(exact / size**0.5, blocks)
    hadamard = None
    if layout.online_hadamard_size > 1:
        hadamard = hadamard_matrix(layout.online_hadamard_size).float()
    arguments = (blocks, hadamard, layout.interleave, dtype, clip_ratio)
    return x.to(dtype), ops.OnlineTransform(*arguments).to(GPU)


def exact_transform(x, online):
    hadamard = online.hadamard
    if hadamard is not None:
        hadamard = hadamard.double() * online.norm_scale
    return apply_transform(x.double(), online.weight, hadamard, online.interleave)


@pytest.mark.parametrize("rotation", [Rotation.HADAMARD, Rotation.BLOCK_HADAMARD])
@pytest.mark.parametrize("channels, size, dtype", CASES, ids=str)
def test_transforms_are_those_of_float64(channels, size, dtype, rotation):
    allowed = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}[dtype]
    x, online = inputs(max(TOKENS), channels, size, rotation, dtype)
    expected = exact_transform(x, online)
    for tokens in TOKENS:
        part = slice(max(TOKENS) - tokens, None)
        found, exact = online(x[part]), expected[part]
        assert found.dtype == dtype and found.device.type == GPU
        assert error(found, exact) < allowed, tokens
        for bits, symmetric in ((4, False), (8, True)):
            noise = error(dequantize(*quantize_per_token(exact, bits, symmetric)), exact)
            found = error(dequantize(*online.quantize(x[part], bits, symmetric)), exact)
            assert found < 1.02 * noise + allowed, (tokens, bits, symmetric)


@pytest.mark.parametrize("channels, size, dtype", CASES, ids=str)
def test_int8_blocks_are_multiplied_as_floats(channels, size, dtype):
    options = (channels, size, Rotation.BLOCK_HADAMARD, dtype, torch.int8, 0.8)
    x, integers = inputs(max(TOKENS), *options)
    floats = dequantize_blocks(integers.weight.detach(), dtype)
    floats = ops.OnlineTransform(floats, None, 1, dtype, 0.8).to(GPU)
    # the tensor cores get the channels of int8 blocks in another order, and sum them so: a
    # few results round to the other side
    allowed = max(torch.finfo(dtype).eps / 4, 1e-6)
    for tokens in TOKENS:
        part = x[:tokens]
        assert error(integers(part), floats(part).double()) < allowed, tokens
        found, expected = (
            dequantize(*one.quantize(part, 4, False)) for one in (integers, floats)
        )
        assert error(found, expected) < 0.1, tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5000, 14336])
@pytest.mark.parametrize("clip_ratio", [None, 0.8])
@pytest.mark.parametrize("tokens", [300, 1500])
def test_quantization_alone_is_exact(channels, dtype, tokens, clip_ratio):
    x = torch.randn(tokens, channels, device=GPU).to(dtype)
    largest = torch.finfo(dtype).max
    x[0], x[1, 0], x[2] = 0, largest, largest
    x[3], x[4] = torch.finfo(dtype).tiny, -x[5].abs()
    x[6:9] = x[6:9] * 1e4 + 3
    if dtype != torch.float16:  # scales of all sizes
        x[9:300] *= torch.logspace(-37, 37, 291, device=GPU)[:, None].to(dtype)
    ratio = None if clip_ratio is None else torch.tensor(clip_ratio, device=GPU)
    for bits in (4, 8):
        for symmetric in (False, True):
            found = torch.ops.cat_modifier.quantize(x, bits, symmetric, ratio)
            expected = reference(x, bits, symmetric, ratio)
            for name, one, other in zip(
                ("q", "scales", "zero points"), found, expected, strict=True
            ):
                if other is not None:
                    different = (one != other).any(1).nonzero().flatten().tolist()
                    assert not different, (name, bits, symmetric, different[:9])


@pytest.mark.parametrize("rotation", [Rotation.HADAMARD, Rotation.BLOCK_HADAMARD])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_token_that_is_not_finite_is_no_number_after_it(value, symmetric, rotation):
    x, online = inputs(2048, 1536, 96, rotation, torch.bfloat16)
    x[1, 1437] = value
    for tokens in (3, 2048):
        _, scales, _ = online.quantize(x[:tokens], 4, symmetric)
        assert scales.isnan().flatten().nonzero().flatten().tolist() == [1]
    _, scales, _ = ops.quantize(x[:3], 4, symmetric)
    assert scales.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("rotation", [Rotation.HADAMARD, Rotation.BLOCK_HADAMARD])
def test_tokens_need_not_be_contiguous(rotation):
    x, online = inputs(40, 1536, 96, rotation, torch.bfloat16)
    wide = torch.cat([x, x], 1)
    for found, expected in zip(
        online.quantize(wide[::2, :1536], 4, False),
        online.quantize(x[::2].contiguous(), 4, False),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rotation", [Rotation.HADAMARD, Rotation.BLOCK_HADAMARD])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_graphs_replay_the_operators(tokens, rotation):
    x, online = inputs(tokens, 4096, 128, rotation, torch.bfloat16, torch.int8, 0.9)
    ops.warm_up(x, 4, False, online)
    graph, x = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        found = online.quantize(x, 4, False)
    for seed in range(2):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        for one in found:
            one.zero_()
        graph.replay()
        for one, other in zip(found, online.quantize(x, 4, False), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rotation", [Rotation.HADAMARD, Rotation.BLOCK_HADAMARD])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_operators_can_be_compiled(mode, rotation):
    x, online = inputs(300, 1536, 96, rotation, torch.bfloat16, torch.int8, 0.9)

    def function(x):
        q, scales, zero_points = online.quantize(torch.relu(x), 4, False)
        return (q - zero_points) * scales, online(x)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    for tokens in (1, 300):
        for _ in range(3):  # graphs are captured at the second call
            found = [one.clone() for one in compiled(x[:tokens])]
        for one, other in zip(found, function(x[:tokens]), strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)


def test_offsets_do_not_overflow():
    tokens, channels = 2**17 + 3, 2**14
    if torch.cuda.get_device_properties(0).total_memory < 32 * 2**30:
        pytest.skip("needs 32 GiB")
    for rotation in (Rotation.HADAMARD, Rotation.BLOCK_HADAMARD):
        _, online = inputs(1, channels, 128, rotation, torch.bfloat16)
        x = torch.randn(tokens, channels, device=GPU, dtype=torch.bfloat16)
        last = x[-2100:].clone()
        q, scales, _ = online.quantize(x, 4, False)
        expected = online.quantize(last, 4, False)
        assert (q[-2100:].int() - expected[0]).abs().max() <= 1
        torch.testing.assert_close(scales[-2100:], expected[1], rtol=0.01, atol=0)
        del x, q
