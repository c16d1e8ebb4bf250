# SPDX-License-Identifier: Apache-2.0
"""
What vLLM runs on an NVIDIA GPU up to Hopper, without one: layers of vLLM take the branches of
a GPU, and its wrappers call CUTLASS by the schemas of vLLM 0.33.

CUTLASS itself is written out in PyTorch here, with the checks of its operands that vLLM's C++
has. The kernels in Triton have tests of their own.
"""

import pytest
import torch

# asks the platform when it is imported, which is when vLLM makes its first layer
import vllm.model_executor.layers.quantization.online.fp8  # noqa: F401
from test_weights import HIDDEN, KINDS, X, load, make_loaded, make_model, process
from test_weights import one_rank as one_rank
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cat_modifier.integrations.vllm.compat import current_platform
from cat_modifier.integrations.vllm.int8_linear import Int8LinearMethod
from cat_modifier.integrations.vllm.kernels import (
    CutlassInt8Kernel,
    UnpackingInt4Kernel,
    choose_kernel,
)
from cat_modifier.kernels.ops import quantize

# as in vllm/_C_stable_libtorch.abi3.so of 0.33.0
SCHEMAS = {
    "cutlass_scaled_mm": "(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, "
    "Tensor? bias) -> ()",
    "cutlass_scaled_mm_azp": "(Tensor! out, Tensor a, Tensor b, Tensor a_scales, "
    "Tensor b_scales, Tensor azp_adj, Tensor? azp, Tensor? bias) -> ()",
}


def _multiply(out, a, b, a_scales, b_scales, azp_adj, azp, bias):
    assert a.dtype == b.dtype == torch.int8 and out.dtype in (torch.bfloat16, torch.float16)
    assert a.stride(1) == out.stride(1) == 1 and b.stride(0) == 1  # b is column-major
    assert b.stride(1) % 16 == out.stride(0) % 16 == 0
    assert a_scales.dtype == b_scales.dtype == torch.float32
    assert a_scales.numel() == a.shape[0] and b_scales.numel() == b.shape[1]
    assert a_scales.is_contiguous() and b_scales.is_contiguous()
    sums = a.long() @ b.long()
    if azp_adj is not None:
        assert azp_adj.dtype == azp.dtype == torch.int32
        assert azp_adj.numel() == b.shape[1] and azp.numel() == a.shape[0]
        sums = sums - azp.view(-1, 1) * azp_adj.view(1, -1)
    product = sums.float() * a_scales.view(-1, 1) * b_scales.view(1, -1)
    out.copy_(product if bias is None else product + bias.float())


def _scaled_mm(out, a, b, a_scales, b_scales, bias):
    _multiply(out, a, b, a_scales, b_scales, None, None, bias)


@pytest.fixture(scope="module", autouse=True)
def cutlass():
    """The operators of vLLM, which builds for CPUs lack"""
    library = torch.library.Library("_C", "FRAGMENT")
    for name, function in (
        ("cutlass_scaled_mm", _scaled_mm),
        ("cutlass_scaled_mm_azp", _multiply),
    ):
        library.define(name + SCHEMAS[name])
        library.impl(name, function, "CPU")
        torch.library.register_fake(f"_C::{name}", lambda *args: None, lib=library)
    yield
    library._destroy()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(
        current_platform, "has_device_capability", lambda capability, *_: capability <= 90
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_cutlass_multiplies_what_was_quantized(symmetric, with_bias, dtype, tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, 576) + 0.5
    weight = torch.randint(-8, 8, (192, 576), dtype=torch.int8)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(torch.rand(192, 1) + 0.1, requires_grad=False)
    bias = torch.randn(192).to(dtype) if with_bias else None
    q, scales, zero_points = quantize(x, 4, symmetric)

    kernel = CutlassInt8Kernel("weight", symmetric, dtype)
    kernel.process_weights(layer, weight)
    found = kernel.apply(layer, q, scales, zero_points, bias)
    shifted = q.double() - (0 if zero_points is None else zero_points)
    expected = scales * (shifted @ weight.double().T) * layer.weight_scale.T
    if bias is not None:
        expected = expected + bias
    assert found.dtype == dtype
    assert (found - expected).norm() / expected.norm() < torch.finfo(dtype).eps


def test_the_product_is_that_of_the_gpu(hopper, monkeypatch):
    assert choose_kernel() is CutlassInt8Kernel
    assert choose_kernel(keeps_packed=True) is UnpackingInt4Kernel
    monkeypatch.setattr(current_platform, "has_device_capability", lambda *_: True)
    with pytest.raises(NotImplementedError, match="On Blackwell use NVFP4"):
        choose_kernel()


@KINDS
@pytest.mark.parametrize("compiles", [False, True])
def test_layers_compute_what_they_do_on_a_cpu(
    hopper, monkeypatch, keeps_packed, is_quantized, compiles
):
    model = make_model(keeps_packed, is_quantized, dtype=torch.bfloat16)
    load(model, 0)
    process(model)
    for layer in (model.qkv_proj, model.gate):
        assert layer.requires_unquantized_input
        if is_quantized:
            kernel = UnpackingInt4Kernel if keeps_packed else CutlassInt8Kernel
            assert isinstance(layer.quant_method, Int8LinearMethod)
            assert type(layer.quant_method.kernel) is kernel
    function = torch.compile(model, fullgraph=True, backend="eager") if compiles else model
    x = X.bfloat16()
    found = function(x).float()

    monkeypatch.undo()
    expected = make_loaded(keeps_packed, is_quantized, 0)(x.float())
    assert (found - expected).norm() / expected.norm() < 0.02


class IntMmOfAGpu(TorchDispatchMode):
    """Checks operands as PyTorch does on a GPU, and not for fake tensors"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._int_mm.default:
            x, weight = args
            assert x.device.type == weight.device.type == "cuda"
            assert x.shape[0] > 16 and x.shape[1] % 8 == weight.shape[1] % 8 == 0
        return func(*args, **(kwargs or {}))


@KINDS
def test_all_that_a_layer_does_with_a_token_stays_on_its_gpu(
    hopper, keeps_packed, is_quantized
):
    model = make_model(keeps_packed, is_quantized, dtype=torch.bfloat16)
    load(model, 0)
    process(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with FakeTensorMode(), IntMmOfAGpu():
        fakes = tree_map_only(
            Tensor,
            lambda one: torch.empty_strided(
                one.shape, one.stride(), dtype=one.dtype, device="cuda"
            ),
            tensors,
        )
        for tokens in (1, 16, 300):
            x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
            out = torch.func.functional_call(model, fakes, x)
            assert out.device.type == "cuda" and out.dtype == torch.bfloat16
            assert out.shape == (tokens, 8 * 16 + HIDDEN)
