# SPDX-License-Identifier: Apache-2.0
"""
On GPUs: the transform fused with quantization, in Triton.

Without a Hadamard matrix after the blocks, one kernel does everything: a program has some
tokens, and computes their blocks twice, for the range and for the codes, which is cheaper
than a round trip through memory. With it, or with too few tokens to fill the GPU so, the
blocks of all tokens are computed by one kernel, in parallel, and a second one, with a
program for each token, mixes and quantizes them: a row of 14336 channels of 16 tokens does
not fit in a multiprocessor, but one of one token does, as an (p, q) matrix which is
multiplied by H on tensor cores. What is between the two stays in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_modifier.functional.transform import apply_blocks

__all__ = ["quantize", "transform", "transform_quantize"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_STEP = tl.constexpr(64)
"""Channels that are summed at once, which bounds the shared memory of a program"""

_LARGEST_BLOCK = 256
"""Larger ones are left to cuBLAS: nothing is gained by fusing them"""

_FUSED_FROM = 2048
"""Tokens which fill a GPU with programs of 16"""


def transform(x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, stride: int) -> Tensor:
    """
    :param x: shape (tokens, d), dtype of all others
    :return: shape (tokens, d)
    """
    z = _block_products(x, blocks)
    if hadamard is None:
        return z
    out = torch.empty_like(x)
    _rows(z, hadamard, stride, out, None, None, 8, True, None)
    return out


def transform_quantize(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None,
    stride: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    :param x: shape (tokens, d), dtype of all others
    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`
    """
    tokens, features = x.shape
    size = 0 if blocks is None else blocks.shape[-1]
    is_fused = hadamard is None and tokens >= _FUSED_FROM and 0 < size <= _LARGEST_BLOCK
    if not is_fused:
        z = _block_products(x, blocks)
        return _quantize_rows(z, hadamard, stride, num_bits, symmetric, clip_ratio)
    x = x.contiguous()
    codes, scales, zero_points = _outputs(x, symmetric)
    tile = 16
    _blocks_quantize_kernel[(triton.cdiv(tokens, tile),)](
        x,
        blocks,
        codes,
        scales,
        zero_points,
        clip_ratio,
        tokens,
        features,
        COUNT=features // size,
        SIZE=size,
        TILE=tile,
        PADDED=_padded(size),
        BITS=num_bits,
        SYMMETRIC=symmetric,
        PRECISION=_precision(x),
        num_warps=4 if size <= 128 else 8,
    )
    return codes, scales, zero_points


def quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    :param x: shape (tokens, d)
    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`
    """
    return _quantize_rows(x.contiguous(), None, x.shape[1], num_bits, symmetric, clip_ratio)


def _block_products(x: Tensor, blocks: Tensor | None) -> Tensor:
    if blocks is None:
        return x.contiguous()
    tokens, features, size = *x.shape, blocks.shape[-1]
    if size > _LARGEST_BLOCK:
        return apply_blocks(x, blocks)
    x = x.contiguous()
    z = torch.empty_like(x)
    tile = 16 if tokens <= 16 else 64
    if tokens:
        _blocks_kernel[(features // size, triton.cdiv(tokens, tile))](
            x,
            blocks,
            z,
            tokens,
            features,
            SIZE=size,
            TILE=tile,
            PADDED=_padded(size),
            PRECISION=_precision(x),
            num_warps=4 if tile * size < 8192 else 8,
        )
    return z


def _quantize_rows(
    z: Tensor,
    hadamard: Tensor | None,
    stride: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zero_points = _outputs(z, symmetric)
    if hadamard is None:
        stride = z.shape[1]
    _rows(z, hadamard, stride, codes, scales, zero_points, num_bits, symmetric, clip_ratio)
    return codes, scales, zero_points


def _rows(
    z: Tensor,
    hadamard: Tensor | None,
    stride: int,
    out: Tensor,
    scales: Tensor | None,
    zero_points: Tensor | None,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None,
):
    tokens, features = z.shape
    size = 1 if hadamard is None else hadamard.shape[0]
    rows, columns, warps = row_shape(size, stride)
    if tokens:
        _rows_kernel[(tokens,)](
            z,
            hadamard,
            out,
            scales,
            zero_points,
            clip_ratio,
            features,
            SPANS=features // (size * stride),
            SIZE=size,
            STRIDE=stride,
            ROWS=rows,
            COLUMNS=columns,
            BITS=num_bits,
            SYMMETRIC=symmetric,
            QUANTIZE=scales is not None,
            PRECISION=_precision(z),
            num_warps=warps,
        )


def row_shape(size: int, stride: int) -> tuple[int, int, int]:
    """
    :param size: p, order of the Hadamard matrix; 1 if there is none
    :return: rows and columns of a span in registers, and the warps which hold it
    """
    rows = 1 if size == 1 else _padded(size)
    columns = max(64, triton.next_power_of_2(stride)) if size == 1 else _padded(stride)
    elements = rows * columns
    return rows, columns, 4 if elements <= 8192 else 8 if elements <= 16384 else 16


def _outputs(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return codes, scales, None if symmetric else torch.empty_like(scales, dtype=torch.int32)


def _padded(size: int) -> int:
    """What tensor cores can multiply"""
    return max(16, triton.next_power_of_2(size))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _blocks_kernel(
    x_ptr,
    blocks_ptr,
    z_ptr,
    tokens,
    features,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of TILE tokens: z = x T^T"""
    block = tl.program_id(0)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    z, offsets, mask = _block_product(
        x_ptr, blocks_ptr, block, rows, tokens, features, SIZE, PADDED, PRECISION
    )
    tl.store(z_ptr + offsets, _cast(z, z_ptr.dtype.element_ty), mask)


@triton.jit
def _block_product(
    x_ptr,
    blocks_ptr,
    block,
    rows,
    tokens,
    features,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    outputs = tl.arange(0, PADDED)
    # 64 bits: 131,072 tokens of 16,384 channels do not fit in 32
    start = rows.to(tl.int64)[:, None] * features + block * SIZE
    is_token = (rows < tokens)[:, None]
    step: tl.constexpr = min(PADDED, _STEP)
    product = tl.zeros((rows.shape[0], PADDED), tl.float32)
    for first in tl.static_range(0, PADDED, step):
        inputs = first + tl.arange(0, step)
        x = tl.load(x_ptr + start + inputs, is_token & (inputs < SIZE), other=0.0)
        weight = tl.load(
            blocks_ptr + block * SIZE * SIZE + outputs * SIZE + inputs[:, None],
            (inputs < SIZE)[:, None] & (outputs < SIZE),
            other=0.0,
        )
        product = _dot(x, weight, product, PRECISION)
    return product, start + outputs, is_token & (outputs < SIZE)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    if _IS_INTERPRETED and dtype == tl.bfloat16:
        # the interpreter would cut bits off; this rounds to nearest, as GPUs do
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, sum, PRECISION: tl.constexpr):
    if _IS_INTERPRETED:  # the interpreter cannot multiply bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _blocks_quantize_kernel(
    x_ptr,
    blocks_ptr,
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    clip_ptr,
    tokens,
    features,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All blocks of TILE tokens, twice: for their range, then for their codes"""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # zero is in every range, and channels which only pad are zero
    low = tl.zeros((TILE,), tl.float32)
    high = tl.zeros((TILE,), tl.float32)
    for block in range(COUNT):
        z, _, _ = _block_product(
            x_ptr, blocks_ptr, block, rows, tokens, features, SIZE, PADDED, PRECISION
        )
        low = tl.minimum(low, tl.min(z, 1))
        high = tl.maximum(high, tl.max(z, 1))
    scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
    tl.store(scales_ptr + rows, scale, rows < tokens)
    if not SYMMETRIC:
        tl.store(zero_points_ptr + rows, zero_point.to(tl.int32), rows < tokens)
    for block in range(COUNT):
        z, offsets, mask = _block_product(
            x_ptr, blocks_ptr, block, rows, tokens, features, SIZE, PADDED, PRECISION
        )
        codes = _codes(z, scale[:, None], zero_point[:, None], BITS)
        tl.store(codes_ptr + offsets, codes, mask)


@triton.jit
def _rows_kernel(
    z_ptr,
    hadamard_ptr,
    out_ptr,
    scales_ptr,
    zero_points_ptr,
    clip_ptr,
    features,
    SPANS: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One token: H z of each span, and their codes"""
    token = tl.program_id(0)
    start = token.to(tl.int64) * features
    low = tl.zeros((), tl.float32)
    high = tl.zeros((), tl.float32)
    if SPANS == 1:  # which stays in registers
        y, offsets, mask = _mixed(
            z_ptr, hadamard_ptr, start, 0, SIZE, STRIDE, ROWS, COLUMNS, PRECISION
        )
        if QUANTIZE:
            low = tl.minimum(low, tl.min(y))
            high = tl.maximum(high, tl.max(y))
            scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
            tl.store(out_ptr + offsets, _codes(y, scale, zero_point, BITS), mask)
        else:
            tl.store(out_ptr + offsets, _cast(y, out_ptr.dtype.element_ty), mask)
    else:
        for span in range(SPANS):
            y, offsets, mask = _mixed(
                z_ptr, hadamard_ptr, start, span, SIZE, STRIDE, ROWS, COLUMNS, PRECISION
            )
            if QUANTIZE:
                low = tl.minimum(low, tl.min(y))
                high = tl.maximum(high, tl.max(y))
            else:
                tl.store(out_ptr + offsets, _cast(y, out_ptr.dtype.element_ty), mask)
        if QUANTIZE:
            scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
            for span in range(SPANS):
                y, offsets, mask = _mixed(
                    z_ptr, hadamard_ptr, start, span, SIZE, STRIDE, ROWS, COLUMNS, PRECISION
                )
                tl.store(out_ptr + offsets, _codes(y, scale, zero_point, BITS), mask)
    if QUANTIZE:
        tl.store(scales_ptr + token, scale)
        if not SYMMETRIC:
            tl.store(zero_points_ptr + token, zero_point.to(tl.int32))


@triton.jit
def _mixed(
    z_ptr,
    hadamard_ptr,
    start,
    span,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A span of a token as a (SIZE, STRIDE) matrix, multiplied by H"""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    start += span * SIZE * STRIDE
    offsets = start + row * STRIDE + column
    mask = (row < SIZE) & (column < STRIDE)
    if SIZE == 1:
        product = tl.load(z_ptr + offsets, mask, other=0.0).to(tl.float32)
    else:
        step: tl.constexpr = min(ROWS, _STEP)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.static_range(0, ROWS, step):
            inner = first + tl.arange(0, step)
            hadamard = tl.load(
                hadamard_ptr + row * SIZE + inner, (row < SIZE) & (inner < SIZE), other=0.0
            )
            inner = inner[:, None]
            z = tl.load(
                z_ptr + start + inner * STRIDE + column,
                (inner < SIZE) & (column < STRIDE),
                other=0.0,
            )
            product = _dot(hadamard, z, product, PRECISION)
    return product, offsets, mask


@triton.jit
def _quantizer(low, high, clip_ptr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and zero point of a range, as in plain.py"""
    levels: tl.constexpr = 2**BITS - 1
    least: tl.constexpr = -(2 ** (BITS - 1))
    tiny: tl.constexpr = 1.1754943508222875e-38
    if SYMMETRIC:
        half = tl.zeros_like(high) + levels / 2
        scale = tl.maximum(tl.div_rn(tl.maximum(high, -low), half), tiny)
        return scale, tl.zeros_like(scale)
    if clip_ptr is not None:
        ratio = tl.load(clip_ptr)
        low *= ratio
        high *= ratio
    scale = tl.maximum(tl.div_rn(high - low, tl.zeros_like(high) + levels), tiny)
    zero_point = least - tl.div_rn(low, scale)
    zero_point = tl.minimum(tl.maximum(zero_point, least), least + levels)
    return scale, _round(zero_point)


@triton.jit
def _codes(x, scale, zero_point, BITS: tl.constexpr):
    least: tl.constexpr = -(2 ** (BITS - 1))
    greatest: tl.constexpr = 2 ** (BITS - 1) - 1
    x, scale = tl.broadcast(x, scale)
    codes = _round(tl.div_rn(x, scale) + zero_point)
    return tl.minimum(tl.maximum(codes, least), greatest).to(tl.int8)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even: what adding 1.5 * 2^23 leaves of a float32"""
    # larger ones have no fraction, or are clamped
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + 12582912.0) - 12582912.0
