# SPDX-License-Identifier: Apache-2.0
"""Packed 4-bit codes, of Triton's interpreter, against vLLM's and PyTorch's definitions"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from test_kernels import inputs
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    break_fp4_bytes,
    ref_nvfp4_quant,
)

from cat_modifier.kernels import gpu, gpu_packed, plain

# (blocks, size of a block, order of H, its stride)
GEOMETRIES = [(6, 96, 12, 48), (12, 16, 1, 1), (2, 64, 4, 32), (8, 32, 4, 32)]


def exact(x, prepared, hadamard, stride):
    hadamard = None if hadamard is None else hadamard.double()
    return plain.transform(x.double(), prepared.blocks, hadamard, stride)


def unswizzled(scales: torch.Tensor, tokens: int, groups: int) -> torch.Tensor:
    rows, columns = scales.shape
    tiles = scales.view(torch.uint8).view(rows // 128, columns // 4, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)
    assert not plain[tokens:].any() and not plain[:, groups:].any()
    return plain[:tokens, :groups]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
def test_int4(geometry, tokens):
    x, prepared, _ = inputs(tokens, *geometry, torch.bfloat16, outliers=tokens > 1)
    arguments = x, prepared.blocks, prepared.hadamard, geometry[3]
    packed, scales = gpu_packed.transform_pack(*arguments, prepared.gain, "int4", None)
    codes, expected, _ = gpu.transform_quantize(*arguments, 4, True)
    halves = (packed & 0xF).to(torch.int8), (packed >> 4).to(torch.int8)
    unpacked = torch.stack([torch.where(half > 7, half - 16, half) for half in halves], -1)
    assert torch.equal(unpacked.flatten(1), codes)
    assert torch.allclose(scales, expected * prepared.gain)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("tokens", [1, 37, 200])
def test_nvfp4(geometry, tokens):
    x, prepared, hadamard = inputs(tokens, *geometry, torch.float32, outliers=tokens > 1)
    x[0] *= 1e-4  # subnormal scales
    stride = geometry[3]
    y = exact(x, prepared, hadamard, stride).float()
    global_scale = (448 * 6 / y.abs().max()).reshape(1)
    packed, scales = gpu_packed.transform_pack(
        x, prepared.blocks, prepared.hadamard, stride, prepared.gain, "nvfp4", global_scale
    )
    assert scales.dtype == torch.float8_e4m3fn
    groups = y.shape[1] // 16
    scales = unswizzled(scales, tokens, groups).view(torch.float8_e4m3fn).float()
    expected = y.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * global_scale
    # the transform itself differs in the last bits
    near = (scales - expected.to(torch.float8_e4m3fn).float()).abs() <= 0.13 * scales
    same = scales == expected.to(torch.float8_e4m3fn).float()
    assert near.all() and same.float().mean() > 0.99
    values = break_fp4_bytes(packed, torch.float32).view(tokens, groups, 16)
    reference, _ = ref_nvfp4_quant(y, global_scale, 16)
    same = values == reference.view(tokens, groups, 16)
    assert same.float().mean() > 0.99
    found = values * scales[..., None] / global_scale
    wanted = (
        reference.view(tokens, groups, 16) * expected.to(torch.float8_e4m3fn).float()[..., None]
    )
    error = (found - y.view_as(found)).norm()
    assert error < 1.01 * (wanted / global_scale - y.view_as(found)).norm()


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g[3] != 48], ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
def test_mxfp4(geometry, tokens):
    x, prepared, hadamard = inputs(tokens, *geometry, torch.float32, outliers=tokens > 1)
    stride = geometry[3]
    y = exact(x, prepared, hadamard, stride).float().unflatten(1, (-1, 32))
    packed, scales = gpu_packed.transform_pack(
        x, prepared.blocks, prepared.hadamard, stride, prepared.gain, "mxfp4", None
    )
    scales = unswizzled(scales, tokens, y.shape[1])
    expected = (y.abs().amax(-1) / 6).log2().ceil() + 127
    assert (scales == expected).float().mean() > 0.99
    values = break_fp4_bytes(packed, torch.float32).view_as(y)
    scaled = y / torch.exp2(scales.float() - 127)[..., None]
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = (scaled.abs()[..., None] - grid).abs().amin(-1)
    assert ((values - scaled).abs() <= nearest + 1e-5).all()


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_zeros_stay_zeros(format):
    x, prepared, _ = inputs(3, 2, 64, 1, 1, torch.bfloat16, False)
    scale = torch.ones(1)
    arguments = prepared.blocks, None, 1, 1.0, format, scale
    packed, _ = gpu_packed.transform_pack(torch.zeros_like(x), *arguments)
    assert not packed.any()


def test_groups_which_are_cut_by_the_hadamard_product_are_refused():
    x, prepared, _ = inputs(1, 24, 8, 48, 4, torch.bfloat16, False)
    with pytest.raises(ValueError, match="Groups of 16 channels do not divide the 4"):
        gpu_packed.transform_pack(
            x, prepared.blocks, prepared.hadamard, 4, 1.0, "nvfp4", torch.ones(1)
        )
