# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    fake_quantize,
    preset_name_to_scheme,
)
from llmcompressor.observers import Observer

from cat_modifier.mathematics.clipping import clip_tokens
from cat_modifier.mathematics.sqnr import quantize_by_range
from cat_modifier.training.rounding import quantize_activations, quantize_weight, range_ratio

TOKEN = QuantizationArgs(num_bits=4, strategy="token", symmetric=False, dynamic=True)
CHANNEL = QuantizationArgs(num_bits=4, strategy="channel", observer="memoryless_mse")
GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=16, symmetric=False)
FLOATS = {
    name: preset_name_to_scheme(name, ["Linear"]) for name in ("NVFP4", "MXFP4", "FP8_DYNAMIC")
}


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 64, generator=generator)


def test_activations_are_clipped_and_quantized(x):
    expected = quantize_by_range(clip_tokens(x.flatten(0, 1), 0.8), TOKEN).view_as(x)
    torch.testing.assert_close(quantize_activations(x, TOKEN, 0.8), expected)


@pytest.mark.parametrize(
    "args",
    [CHANNEL, GROUP, *(scheme.weights for scheme in FLOATS.values())],
    ids=["channel", "group", *FLOATS],
)
def test_weights_are_quantized_as_by_llm_compressor(x, args):
    weight = x.flatten(0, 1)
    observer = Observer.load_from_registry(
        args.observer or "memoryless_minmax", base_name="weight", args=args.model_copy()
    )
    observer(weight)
    found = observer.get_qparams()
    expected = fake_quantize(
        weight, found["scale"], found["zero_point"], args, found["global_scale"]
    )
    result = quantize_weight(weight, args, range_ratio(weight, args))
    # a value on the edge between two integers can go either way
    assert ((result - expected).abs() > 1e-4).float().mean() < 0.01


@pytest.mark.parametrize(
    "args, ratio",
    [(TOKEN, 1.0), (TOKEN, 0.7), *((one.input_activations, 1.0) for one in FLOATS.values())],
    ids=["token", "clipped", *FLOATS],
)
def test_gradient_is_that_of_ranges_too(x, args, ratio):
    """What scales with its input has a derivative along it which is the output itself"""
    x.requires_grad_()
    result = quantize_activations(x, args, ratio)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    torch.testing.assert_close((gradient * x).sum(-1), (cotangent * result).sum(-1))


def test_zeros_have_finite_gradients():
    x = torch.zeros(2, 64, requires_grad=True)
    quantize_activations(x, TOKEN, 0.8).sum().backward()
    assert x.grad.isfinite().all()
    weight = torch.zeros(2, 64, requires_grad=True)
    quantize_weight(weight, CHANNEL, range_ratio(weight.detach(), CHANNEL)).sum().backward()
    assert weight.grad.isfinite().all()
