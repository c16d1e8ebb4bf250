# SPDX-License-Identifier: Apache-2.0
"""Integer activations: quantized as compressed-tensors does, and multiplied exactly"""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.integrations.vllm import int8_linear
from cat_modifier.integrations.vllm.int8_linear import (
    Int8LinearMethod,
    Integers,
    keeps_packed,
)
from cat_modifier.integrations.vllm.kernels import (
    OneDNNInt8Kernel,
    PackedInt4Kernel,
    UnpackingInt4Kernel,
    choose_kernel,
)
from cat_modifier.integrations.vllm.registry import TransformRegistry
from cat_modifier.kernels import native
from cat_modifier.kernels.ops import quantize


def activation_args(bits: int, symmetric: bool) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits, type="int", strategy="token", symmetric=symmetric, dynamic=True
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_quantization_is_that_of_compressed_tensors(bits, symmetric, shift):
    torch.manual_seed(0)
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None] + shift
    x[5] = 0
    args = activation_args(bits, symmetric)
    scale, zero_point = compute_dynamic_scales_and_zp(x[None], args, torch.nn.Module())
    expected = fake_quantize(x[None], scale, zero_point, args)[0]

    q, scales, zero_points = quantize(x, bits, symmetric)
    assert q.dtype == torch.int8
    limit = 2 ** (bits - 1)
    assert q.min().item() >= -limit and q.max().item() < limit
    shifted = q if zero_points is None else q - zero_points
    assert torch.allclose(shifted * scales, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module", autouse=True)
def packed_product():
    assert native.why_unavailable() is None


def make_product(kernel, symmetric, weight, scale, dtype):
    """The product as a function of its operands and a bias"""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    kernel = kernel("weight", symmetric, dtype)
    kernel.process_weights(layer, weight)
    return lambda *operands: kernel.apply(layer, *operands)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 32), (7, 576, 192), (130, 1536, 64)])
@pytest.mark.parametrize("kernel", [OneDNNInt8Kernel, PackedInt4Kernel, UnpackingInt4Kernel])
def test_product_is_exact(symmetric, with_bias, shape, kernel):
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs) + 0.5
    weight = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scale = torch.rand(outputs, 1) + 0.1
    bias = torch.randn(outputs) if with_bias else None
    q, scales, zero_points = quantize(x, 4, symmetric)

    product = make_product(kernel, symmetric, weight, scale, torch.float32)
    shifted = q.double() - (0 if zero_points is None else zero_points)
    expected = scales * (shifted @ weight.double().T) * scale.T
    if bias is not None:
        expected = expected + bias
    found = product(q, scales, zero_points, bias)
    assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_weights_do_not_change_a_bit(dtype, bits, symmetric, with_bias):
    generator = torch.Generator().manual_seed(0)
    for tokens, inputs, outputs in (
        (1, 2048, 512),
        (3, 37, 21),
        (13, 576, 192),
        (33, 2048, 97),
        (300, 5001, 83),
    ):
        weight = torch.randint(-8, 8, (outputs, inputs), generator=generator).to(torch.int8)
        weight[0], weight[1] = -8, 7
        scale = torch.rand(outputs, 1, generator=generator) / 100 + 1e-3
        x = torch.randn(tokens, inputs, generator=generator) + 0.5
        x[0] = 1
        bias = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
        operands = (*quantize(x, bits, symmetric), bias)
        found, expected = (
            make_product(kernel, symmetric, weight, scale.clone(), dtype)(*operands)
            for kernel in (PackedInt4Kernel, OneDNNInt8Kernel)
        )
        assert found.dtype == dtype and torch.equal(found, expected)


W4A4, W8A8 = Integers(4, 4, False, True), Integers(8, 8, False, True)


def test_which_weights_stay_packed(monkeypatch):
    options = {}
    config = SimpleNamespace(additional_config=options)
    monkeypatch.setattr(int8_linear, "get_current_vllm_config_or_none", lambda: config)
    assert keeps_packed(W4A4) and not keeps_packed(W8A8)
    assert choose_kernel(True) is PackedInt4Kernel and choose_kernel() is OneDNNInt8Kernel
    for choice in ("int4", "int8"):
        options["cat_weights"] = choice
        assert keeps_packed(W4A4) == (choice == "int4") and not keeps_packed(W8A8)
    options["cat_weights"] = "int2"
    with pytest.raises(ValueError, match="`cat_weights` .* must be int4"):
        keeps_packed(W4A4)


def test_without_a_compiler_the_log_says_what_is_used(monkeypatch):
    options, log = {}, []
    config = SimpleNamespace(additional_config=options)
    monkeypatch.setattr(int8_linear, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(
        int8_linear.logger, "warning_once", lambda text, *args: log.append(text % args)
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(int8_linear, "why_unavailable", native.why_unavailable.__wrapped__)
    for integers in (W8A8, W4A4):
        assert not keeps_packed(integers)
        text = log.pop()
        assert text.startswith("Serving takes longer") and "no-such-compiler" in text
        assert ("weights take 8 bits each in memory" in text) == (integers is W4A4)
    options["cat_weights"] = "int4"
    assert not keeps_packed(W8A8)
    with pytest.raises(RuntimeError, match="no-such-compiler.*: install g[+][+]"):
        keeps_packed(W4A4)


class Layer(torch.nn.Module):
    """Attributes of vLLM's linear layers that a linear method reads"""

    prefix = "a layer"


def load(parameter, tensor):
    """As vLLM's loaders: no other shape fits"""
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)


def make_layer(weight_bits: int, input_bits: int, symmetric: bool, inputs=64, outputs=32):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weights = QuantizationArgs(num_bits=weight_bits, type="int", strategy="channel")
    args = activation_args(input_bits, symmetric)
    integers = Integers.read(weights, args, None, "pack-quantized")
    registry = TransformRegistry(CATTransformConfig.empty())
    method = Int8LinearMethod(integers, registry)
    layer = Layer()
    method.create_weights(
        layer, inputs, [outputs], inputs, outputs, torch.float32, weight_loader=load
    )
    torch.manual_seed(0)
    limit = 2 ** (weight_bits - 1)
    q = torch.randint(-limit, limit, (outputs, inputs), dtype=torch.int8)
    layer.weight_packed.data.copy_(pack_to_int32(q, weight_bits))
    layer.weight_scale.data.fill_(0.5)
    method.process_weights_after_loading(layer)
    return method, layer, q.float() * 0.5


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """Set the tensor parallel rank, which parameters of vLLM read"""
    import vllm.model_executor.parameter as parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_really_have_four_bits(symmetric):
    """
    In 4 bits, small values beside a large one are rounded to zero. The output is then the
    output of the large value alone; with 8 or 16 bits it is not.
    """
    x = torch.full((1, 64), 0.02)
    x[0, 0] = 1.0
    outputs = {}
    for bits in (4, 8):
        method, layer, weight = make_layer(4, bits, symmetric)
        outputs[bits] = method.apply(layer, x, None)
    large_alone = x[:, :1] @ weight[:, :1].T
    full = x @ weight.T
    step = 1 / 7.5 if symmetric else 1 / 15
    expected = (7 * step if symmetric else 1.0) * large_alone
    assert torch.allclose(outputs[4], expected, atol=1e-5)
    assert (outputs[4] - full).norm() > 3 * (outputs[8] - full).norm()


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
def test_layer_output_is_that_of_quantized_operands(shape):
    method, layer, weight = make_layer(4, 4, False)
    x, bias = torch.randn(shape), torch.randn(32)
    args = activation_args(4, False)
    tokens = x.reshape(1, -1, 64)
    scale, zero_point = compute_dynamic_scales_and_zp(tokens, args, torch.nn.Module())
    quantized = fake_quantize(tokens, scale, zero_point, args).reshape(shape)
    expected = torch.nn.functional.linear(quantized, weight, bias)
    assert torch.allclose(method.apply(layer, x, bias), expected, atol=1e-4)


@pytest.mark.parametrize(
    "weights, inputs, output_format",
    [
        ({"strategy": "group", "group_size": 32}, {}, "pack-quantized"),
        ({"symmetric": False}, {}, "pack-quantized"),
        ({}, {"strategy": "group", "group_size": 32}, "pack-quantized"),
        ({}, {"dynamic": False, "strategy": "tensor"}, "pack-quantized"),
        ({"num_bits": 8}, {"num_bits": 8}, "int-quantized"),
    ],
)
def test_what_is_left_to_vllm(weights, inputs, output_format):
    weight_args = {"num_bits": 4, "type": "int", "strategy": "channel"} | weights
    input_args = {
        "num_bits": 4,
        "type": "int",
        "strategy": "token",
        "dynamic": True,
    } | inputs
    weights, inputs = QuantizationArgs(**weight_args), QuantizationArgs(**input_args)
    assert Integers.read(weights, inputs, None, output_format) is None


@pytest.mark.parametrize("parts", [1, 4])
def test_shapes_of_weights_that_transformers_has_merged(parts):
    _, layer, _ = make_layer(4, 4, False)
    shape = layer.weight_shape
    shape.weight_loader(shape, torch.tensor([32 // parts, 64] * parts))
    with pytest.raises(RuntimeError):
        shape.weight_loader(shape, torch.tensor([32, 64, 1]))
