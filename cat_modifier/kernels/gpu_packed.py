# SPDX-License-Identifier: Apache-2.0
"""
On GPUs: the transform fused with quantization to packed 4-bit codes, in Triton.

No vLLM kernel is handed these codes yet: that waits for a GPU to try it on.

Two codes a byte, that of the even channel in the low half. The formats, and who reads them:

| name    | code                | scale                                   | reader          |
| ------- | ------------------- | --------------------------------------- | --------------- |
| `int4`  | two's complement    | float32, one a token                    | Humming         |
| `nvfp4` | e2m1, 16 to a scale | e4m3, relative to one of the whole      | NVFP4 kernels   |
| `mxfp4` | e2m1, 32 to a scale | e8m0: a power of two, the least which   | MXFP4 kernels   |
|         |                     | clips nothing                           |                 |

Scales of groups are in the layout of Blackwell's tensor cores: tiles of 128 tokens and 4
groups, in which 32 tokens are 16 bytes apart, and the next 32 follow after 4 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_modifier.kernels.gpu import (
    _block_products,
    _codes,
    _mixed,
    _precision,
    _quantizer,
    _round,
    row_shape,
)

__all__ = ["GROUP_SIZES", "transform_pack"]

GROUP_SIZES = {"int4": None, "nvfp4": 16, "mxfp4": 32}


def transform_pack(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None,
    stride: int,
    gain: float,
    format: str,
    global_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    :param x: shape (tokens, d), dtype of all others
    :param gain: by which all is multiplied
    :param format: a name in the table above
    :param global_scale: of `nvfp4`: by which scales are multiplied before they are rounded;
        shape (1,), float32
    :return: codes, shape (tokens, d/2), uint8; scales: shape (tokens, 1), float32, of
        `int4`; and of the others, with g channels in a group, shape (tokens, d/g), the
        first rounded up to 128 and the second to 4, float8_e4m3fn or uint8
    :raises ValueError: if groups do not divide the channels which are mixed
    """
    tokens, features = x.shape
    group = GROUP_SIZES[format]
    size = 1 if hadamard is None else hadamard.shape[0]
    if hadamard is None:
        stride = features
    if stride % (group or 2):
        raise ValueError(
            f"Groups of {group or 2} channels do not divide the {stride} which the Hadamard "
            f"matrix leaves together: {format} needs other blocks"
        )
    z = _block_products(x, blocks)
    codes = x.new_empty((tokens, features // 2), dtype=torch.uint8)
    if group is None:
        scales, columns = x.new_empty((tokens, 1), dtype=torch.float32), 0
    else:
        rows = triton.cdiv(tokens, 128) * 128
        columns = triton.cdiv(features // group, 4) * 4
        scales = x.new_zeros((rows, columns), dtype=torch.uint8)
    if tokens:
        rows, channels, warps = row_shape(size, stride)
        _pack_kernel[(tokens,)](
            z,
            hadamard,
            codes,
            scales,
            global_scale,
            gain,
            features,
            columns,
            SPANS=features // (size * stride),
            SIZE=size,
            STRIDE=stride,
            ROWS=rows,
            COLUMNS=channels,
            FORMAT=format,
            GROUP=group or 2,
            PRECISION=_precision(z),
            num_warps=warps,
        )
    return codes, scales.view(torch.float8_e4m3fn) if format == "nvfp4" else scales


@triton.jit
def _pack_kernel(
    z_ptr,
    hadamard_ptr,
    codes_ptr,
    scales_ptr,
    global_scale_ptr,
    gain,
    features,
    scale_columns,
    SPANS: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One token"""
    token = tl.program_id(0).to(tl.int64)
    start = token * features
    token_scale = 0.0
    if FORMAT == "int4":
        largest = tl.zeros((), tl.float32)
        for span in range(SPANS):
            y, offsets, mask = _mixed(
                z_ptr, hadamard_ptr, start, span, SIZE, STRIDE, ROWS, COLUMNS, PRECISION
            )
            largest = tl.maximum(largest, tl.max(tl.abs(y)))
        token_scale, zero_point = _quantizer(-largest, largest, None, 4, True)
        tl.store(scales_ptr + token, token_scale * gain)
    row = tl.arange(0, ROWS)[:, None]
    for span in range(SPANS):
        y, offsets, mask = _mixed(
            z_ptr, hadamard_ptr, start, span, SIZE, STRIDE, ROWS, COLUMNS, PRECISION
        )
        if FORMAT == "int4":
            codes = _codes(y, token_scale, 0.0, 4).to(tl.int32) & 0xF
        else:
            groups = (y * gain).reshape(ROWS, COLUMNS // GROUP, GROUP)
            group_largest = tl.max(tl.abs(groups), 2)
            if FORMAT == "nvfp4":
                factor = tl.load(global_scale_ptr)
                scale_code, scale = _e4m3(_divide(group_largest, 6.0) * factor)
            else:
                factor = 1.0
                scale_code, scale = _e8m0(_divide(group_largest, 6.0))
            is_zero = scale == 0
            scaled = tl.where(
                is_zero[:, :, None],
                0.0,
                _divide(groups * factor, tl.where(is_zero, 1.0, scale)[:, :, None]),
            )
            codes = _e2m1(scaled).reshape(ROWS, COLUMNS)
            group = tl.arange(0, COLUMNS // GROUP)[None, :]
            column = (span * SIZE * STRIDE + row * STRIDE) // GROUP + group
            tile = (token // 128) * (scale_columns // 4) + column // 4
            place = (token % 32) * 16 + (token % 128) // 32 * 4 + column % 4
            tl.store(
                scales_ptr + tile * 512 + place,
                scale_code.to(tl.uint8),
                (row < SIZE) & (group * GROUP < STRIDE),
            )
        low, high = tl.split(codes.reshape(ROWS, COLUMNS // 2, 2))
        pair = tl.arange(0, COLUMNS // 2)[None, :]
        tl.store(
            codes_ptr + (start + span * SIZE * STRIDE + row * STRIDE) // 2 + pair,
            (low | (high << 4)).to(tl.uint8),
            (row < SIZE) & (pair * 2 < STRIDE),
        )


@triton.jit
def _divide(a, b):
    a, b = tl.broadcast(a, tl.zeros_like(a) + b)
    return tl.div_rn(a, b)


@triton.jit
def _e2m1(x):
    """Code of the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even codes; and the sign"""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
    code += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | tl.where(x < 0, 8, 0)


@triton.jit
def _e4m3(x):
    """Code and value of the nearest, ties to even; at most 448, x not negative"""
    x = tl.minimum(x, 448.0)
    bits = x.to(tl.int32, bitcast=True)
    # three bits of the mantissa are left
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    small = _round(x * 512)  # subnormal: multiples of 2^-9
    is_small = x < 0.015625
    code = tl.where(is_small, small.to(tl.int32), (bits >> 20) - ((127 - 7) << 3))
    return code, tl.where(is_small, small / 512, bits.to(tl.float32, bitcast=True))


@triton.jit
def _e8m0(x):
    """Code and value of the least power of two which is not below x, at least 2^-126"""
    bits = tl.maximum(x, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    exponent = (bits + 0x7FFFFF) >> 23
    return exponent, (exponent << 23).to(tl.float32, bitcast=True)
