# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    fake_quantize,
    preset_name_to_scheme,
)
from llmcompressor.observers import Observer

from cat_modifier.functional.clipping import clip_tokens
from cat_modifier.functional.sqnr import quantization_range, quantize_by_range, range_ends
from cat_modifier.modifiers.cat_training.fake_quant import (
    quantize_activations,
    quantize_weight,
    range_ratio,
)

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


@pytest.mark.parametrize("observer", ["memoryless_minmax", "memoryless_mse"])
@pytest.mark.parametrize(
    "args",
    [CHANNEL, GROUP, *(scheme.weights for scheme in FLOATS.values())],
    ids=["channel", "group", *FLOATS],
)
def test_weights_are_quantized_as_by_llm_compressor(x, args, observer):
    check_weight(x.flatten(0, 1), args.model_copy(update={"observer": observer}))


def test_ranges_may_be_wider_than_values(x):
    args = FLOATS["NVFP4"].weights.model_copy(update={"observer": "nvfp4_expanded_mse"})
    check_weight(x.flatten(0, 1), args)
    assert range_ratio(x.flatten(0, 1), args).max() > 1


def check_weight(weight, args):
    observer = Observer.load_from_registry(
        args.observer, base_name="weight", args=args.model_copy()
    )
    observer(weight)
    found = observer.get_qparams()
    expected = fake_quantize(
        weight, found["scale"], found["zero_point"], args, found["global_scale"]
    )
    result = quantize_weight(weight, args, range_ratio(weight, args))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "args, ratio",
    [(TOKEN, 1.0), (TOKEN, 0.7), *((one.input_activations, 1.0) for one in FLOATS.values())],
    ids=["token", "clipped", *FLOATS],
)
def test_gradient_is_that_of_ranges_too(x, args, ratio):
    """The output scales with the input, so that its derivative along the input is the output"""
    x.requires_grad_()
    result = quantize_activations(x, args, ratio)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    torch.testing.assert_close((gradient * x).sum(-1), (cotangent * result).sum(-1))


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.2])
@pytest.mark.parametrize(
    "args",
    [CHANNEL, GROUP, *(scheme.weights for scheme in FLOATS.values())],
    ids=["channel", "group", *FLOATS],
)
def test_gradient_is_that_of_autograd(x, args, ratio):
    """That of its definition: noise is a constant, which grows with the range or the value"""
    weight = x.flatten(0, 1).requires_grad_()
    ratios = torch.full_like(quantization_range(weight.detach(), args), ratio)
    result = quantize_weight(weight, args, ratios)
    low, high = (end.unsqueeze(-1) * ratio for end in range_ends(weight, args))
    values = weight.unflatten(-1, (low.shape[-2], -1))
    inside = torch.clamp(values, low, high)
    noise = (result.view_as(values) - inside).detach()
    size = (high - low).expand_as(inside)
    if args.type == "float":
        uniform = {4: 2 / 6, 8: 2 * 2.0**-6 / 448}[args.num_bits]
        size = torch.where(inside.abs() > uniform * high, inside.abs(), size)
    expected = (inside + noise * size / size.detach()).flatten(-2)
    cotangent = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, weight, cotangent)[0] for one in (result, expected))
    )


def test_noise_of_floats_near_zero_is_that_of_the_range():
    """Noise of larger floats grows with the value: from 2 on, if the largest float is 6"""
    args = FLOATS["MXFP4"].input_activations
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([5.9, 0.6, 1.9, 2.6])
    x.requires_grad_()
    result = quantize_activations(x, args)
    assert result[0, :4].tolist() == [6.0, 0.5, 2.0, 3.0]
    derivatives = torch.stack(
        [torch.autograd.grad(one, x, retain_graph=True)[0][0, :4] for one in result[0, :4]]
    )
    expected = torch.tensor(
        [
            [6 / 5.9, 0, 0, 0],
            [-0.1 / 5.9, 1, 0, 0],
            [0.1 / 5.9, 0, 1, 0],
            [0, 0, 0, 3 / 2.6],
        ]
    )
    torch.testing.assert_close(derivatives, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "weights, inputs",
    [(CHANNEL, TOKEN), *((one.weights, one.input_activations) for one in FLOATS.values())],
    ids=["integers", *FLOATS],
)
def test_zeros_have_finite_gradients(weights, inputs):
    x = torch.zeros(2, 64, requires_grad=True)
    quantize_activations(x, inputs, 0.8).sum().backward()
    assert x.grad.isfinite().all()
    weight = torch.zeros(2, 64, requires_grad=True)
    quantize_weight(weight, weights, range_ratio(weight.detach(), weights)).sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("args", [TOKEN, *(one.input_activations for one in FLOATS.values())])
def test_no_tokens(args):
    """Experts that no token is routed to"""
    assert quantize_activations(torch.zeros(0, 64), args, 0.8).shape == (0, 64)
