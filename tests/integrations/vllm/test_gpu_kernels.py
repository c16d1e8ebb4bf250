# SPDX-License-Identifier: Apache-2.0
"""The int8 products and the transforms on an NVIDIA GPU; without one, nothing"""

import pytest
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.integrations.vllm.compat import current_platform
from cat_modifier.integrations.vllm.kernels import CutlassInt8Kernel, UnpackingInt4Kernel
from cat_modifier.kernels.ops import OnlineTransform, quantize

pytestmark = pytest.mark.skipif(
    not current_platform.is_cuda() or current_platform.has_device_capability(100),
    reason="needs an NVIDIA GPU, Ampere to Hopper",
)


def exact(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    shifted = q.double() - (0 if zero_point is None else zero_point.double())
    return scale.double() * (shifted @ weight.double().T) * weight_scale.double().T


@pytest.mark.parametrize("kernel", [CutlassInt8Kernel, UnpackingInt4Kernel])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 16, 64, 130, 1024])
@pytest.mark.parametrize("shape", [(192, 576), (4096, 2048), (2048, 8192)], ids=str)
def test_products(kernel, symmetric, with_bias, bits, dtype, tokens, shape):
    torch.manual_seed(0)
    x = (torch.randn(tokens, shape[1], device="cuda") + 0.5).to(dtype)
    weight = torch.randint(-8, 8, shape, dtype=torch.int8, device="cuda")
    layer = Module()
    layer.weight = Parameter(weight, requires_grad=False)
    scales = torch.rand(shape[0], 1, device="cuda") * 1e-3 + 1e-3
    layer.weight_scale = Parameter(scales, requires_grad=False)
    bias = torch.randn(shape[0], device="cuda").to(dtype) if with_bias else None
    q, scale, zero_point = quantize(x, bits, symmetric)

    product = kernel("weight", symmetric, dtype)
    product.process_weights(layer, weight)
    found = product.apply(layer, q, scale, zero_point, bias)
    expected = exact(q, scale, zero_point, weight, scales)
    if bias is not None:
        expected = expected + bias
    assert found.dtype == dtype
    # a rounding to the dtype, and that of CUTLASS's own epilogue
    assert (found - expected).norm() / expected.norm() < torch.finfo(dtype).eps


@pytest.mark.parametrize("precision", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(64, 32, 1), (128, 1, 1), (32, 64, 32), (1, 256, 1)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_transforms(precision, sizes, symmetric, tokens):
    """The kernels in Triton compute what PyTorch does on the CPU, up to roundings"""
    from cat_modifier.functional.hadamard import hadamard_matrix

    k, p, q = sizes
    torch.manual_seed(0)
    blocks = None
    if k > 1:
        blocks = torch.randn(2048 // k, k, k) / k**0.5
        if precision == torch.int8:
            blocks = (blocks * 127 / blocks.abs().amax()).round()
        blocks = blocks.to(precision)
    hadamard = hadamard_matrix(p).float() if p > 1 else None
    ratio = 1.0 if symmetric else 0.9
    dtype = torch.bfloat16
    x = torch.randn(tokens, 2048).to(dtype)
    plain = OnlineTransform(blocks, hadamard, q, torch.float32, ratio)
    expected = plain(x.float())
    module = OnlineTransform(blocks, hadamard, q, dtype, ratio).cuda()
    transformed = module(x.cuda()).float().cpu()
    assert (transformed - expected).norm() / expected.norm() < 0.01

    codes, scale, zero_point = module.quantize(x.cuda(), 4, symmetric)
    shifted = codes.float() - (0 if zero_point is None else zero_point)
    restored = (shifted * scale).cpu()
    step = scale.cpu()
    assert ((restored - expected).abs() <= 0.6 * step + 0.02 * expected.abs() + 1e-3).all()
