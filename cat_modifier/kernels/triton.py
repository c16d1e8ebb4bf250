# SPDX-License-Identifier: Apache-2.0
"""
Kernels for GPUs, in Triton: the transform fused with quantization.

Blocks alone need one kernel. Each program computes the blocks of some tokens twice, first
for the range, then to quantize. This is cheaper than a round trip through memory.

A Hadamard matrix after the blocks needs two kernels, and so do too few tokens to fill the
GPU. The first kernel computes the blocks of all tokens in parallel. The second multiplies by
the Hadamard matrix and quantizes, one program per token: a multiprocessor holds one row of
14336 channels, as a (p, q) matrix for the tensor cores, but not 16 rows. The result of the
first kernel stays in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_modifier.functional.stored import STEP, dequantize_blocks
from cat_modifier.functional.transform import apply_blocks

__all__ = ["quantize", "transform", "transform_quantize"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_STEP = tl.constexpr(64)
"""Channels summed at once. Bounds the shared memory of a program"""

_UNIT = tl.constexpr(STEP)
"""T of a block of int8 ones"""

_LARGEST_BLOCK = 256
"""Channels of the largest block of our kernels. cuBLAS is as fast for larger ones"""

_FUSED_FROM = 2048
"""Number of tokens that fills a GPU with programs of 16 tokens"""


def transform(
    x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, interleave: int
) -> Tensor:
    """
    Multiply tokens by the blocks, then by the Hadamard matrix.

    :param x: shape (tokens, d)
    :param blocks: T, shape (d/k, k, k), dtype of x, or int8 as stored; None for none
    :param hadamard: shape (p, p), dtype of x; None for none
    :param interleave: q, distance of the channels that ``hadamard`` multiplies
    :return: shape (tokens, d)
    """
    z = _block_products(x, blocks)
    if hadamard is None:
        return z
    out = torch.empty_like(x)
    _rows(z, hadamard, interleave, out, None, None, 8, True, None)
    return out


def transform_quantize(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None,
    interleave: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Transform as :func:`transform`, then quantize as :func:`quantize`.

    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`
    """
    tokens, in_features = x.shape
    size = 0 if blocks is None else blocks.shape[-1]
    is_fused = hadamard is None and tokens >= _FUSED_FROM and 0 < size <= _LARGEST_BLOCK
    if not is_fused:
        z = _block_products(x, blocks)
        return _quantize_rows(z, hadamard, interleave, num_bits, symmetric, clip_ratio)
    x = x.contiguous()
    q, scales, zero_points = _outputs(x, symmetric)
    tile = 16
    _blocks_quantize_kernel[(triton.cdiv(tokens, tile),)](
        x,
        blocks,
        q,
        scales,
        zero_points,
        clip_ratio,
        tokens,
        in_features,
        COUNT=in_features // size,
        SIZE=size,
        TILE=tile,
        PADDED=_padded(size),
        BITS=num_bits,
        SYMMETRIC=symmetric,
        PRECISION=_precision(x),
        num_warps=4 if size <= 128 else 8,
    )
    return q, scales, zero_points


def quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Quantize with one dynamic scale per token.

    :param x: shape (tokens, d)
    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`
    """
    return _quantize_rows(x.contiguous(), None, x.shape[1], num_bits, symmetric, clip_ratio)


def _block_products(x: Tensor, blocks: Tensor | None) -> Tensor:
    if blocks is None:
        return x.contiguous()
    tokens, in_features, size = *x.shape, blocks.shape[-1]
    if size > _LARGEST_BLOCK:
        return apply_blocks(x, dequantize_blocks(blocks, x.dtype))
    x = x.contiguous()
    z = torch.empty_like(x)
    tile = 16 if tokens <= 16 else 64
    if tokens:
        _blocks_kernel[(in_features // size, triton.cdiv(tokens, tile))](
            x,
            blocks,
            z,
            tokens,
            in_features,
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
    interleave: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    q, scales, zero_points = _outputs(z, symmetric)
    if hadamard is None:
        interleave = z.shape[1]
    _rows(z, hadamard, interleave, q, scales, zero_points, num_bits, symmetric, clip_ratio)
    return q, scales, zero_points


def _rows(
    z: Tensor,
    hadamard: Tensor | None,
    interleave: int,
    out: Tensor,
    scales: Tensor | None,
    zero_points: Tensor | None,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None,
):
    tokens, in_features = z.shape
    size = 1 if hadamard is None else hadamard.shape[0]
    rows, columns, warps = row_shape(size, interleave)
    if tokens:
        _rows_kernel[(tokens,)](
            z,
            hadamard,
            out,
            scales,
            zero_points,
            clip_ratio,
            in_features,
            SPANS=in_features // (size * interleave),
            SIZE=size,
            INTERLEAVE=interleave,
            ROWS=rows,
            COLUMNS=columns,
            BITS=num_bits,
            SYMMETRIC=symmetric,
            QUANTIZE=scales is not None,
            PRECISION=_precision(z),
            num_warps=warps,
        )


def row_shape(size: int, interleave: int) -> tuple[int, int, int]:
    """
    Choose the shape of a span in registers.

    :param size: p, order of the Hadamard matrix; 1 for none
    :return: rows, columns, number of warps
    """
    rows = 1 if size == 1 else _padded(size)
    columns = max(64, triton.next_power_of_2(interleave)) if size == 1 else _padded(interleave)
    elements = rows * columns
    return rows, columns, 4 if elements <= 8192 else 8 if elements <= 16384 else 16


def _outputs(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return q, scales, None if symmetric else torch.empty_like(scales, dtype=torch.int32)


def _padded(size: int) -> int:
    """Round up to a size that tensor cores multiply"""
    return max(16, triton.next_power_of_2(size))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _blocks_kernel(
    x_ptr,
    blocks_ptr,
    z_ptr,
    tokens,
    in_features,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute z = x T^T for one block of TILE tokens"""
    block = tl.program_id(0)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    z, offsets, mask = _block_product(
        x_ptr, blocks_ptr, block, rows, tokens, in_features, SIZE, PADDED, PRECISION
    )
    tl.store(z_ptr + offsets, _cast(z, z_ptr.dtype.element_ty), mask)


@triton.jit
def _block_product(
    x_ptr,
    blocks_ptr,
    block,
    rows,
    tokens,
    in_features,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    outputs = tl.arange(0, PADDED)
    # 64 bits: offsets of 131,072 tokens of 16,384 channels overflow 32 bits
    start = rows.to(tl.int64)[:, None] * in_features + block * SIZE
    is_token = (rows < tokens)[:, None]
    step: tl.constexpr = min(PADDED, _STEP)
    product = tl.zeros((rows.shape[0], PADDED), tl.float32)
    for first in tl.static_range(0, PADDED, step):
        inputs = first + tl.arange(0, step)
        x = tl.load(x_ptr + start + inputs, is_token & (inputs < SIZE), other=0.0)
        weight = tl.load(
            blocks_ptr + block * SIZE * SIZE + outputs * SIZE + inputs[:, None],
            (inputs < SIZE)[:, None] & (outputs < SIZE),
            other=0,
        )
        product = _dot(x, weight, product, PRECISION)
    if blocks_ptr.dtype.element_ty == tl.int8:
        product *= _UNIT
    return product, start + outputs, is_token & (outputs < SIZE)


@triton.jit
def _cast(x, dtype: tl.constexpr):
    if _IS_INTERPRETED and dtype == tl.bfloat16:
        # round to nearest as GPUs do; the interpreter would truncate
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, sum, PRECISION: tl.constexpr):
    if _IS_INTERPRETED:  # the interpreter cannot multiply bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    return tl.dot(a, b.to(a.dtype), sum, input_precision=PRECISION)


@triton.jit
def _blocks_quantize_kernel(
    x_ptr,
    blocks_ptr,
    q_ptr,
    scales_ptr,
    zero_points_ptr,
    clip_ptr,
    tokens,
    in_features,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute all blocks of TILE tokens twice: for the range, then to quantize"""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # padding with zeros is harmless: every range contains zero
    low = tl.zeros((TILE,), tl.float32)
    high = tl.zeros((TILE,), tl.float32)
    for block in range(COUNT):
        z, _, _ = _block_product(
            x_ptr, blocks_ptr, block, rows, tokens, in_features, SIZE, PADDED, PRECISION
        )
        low, high = _wider(low, high, z, 1)
    scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
    tl.store(scales_ptr + rows, scale, rows < tokens)
    if not SYMMETRIC:
        tl.store(zero_points_ptr + rows, zero_point.to(tl.int32), rows < tokens)
    for block in range(COUNT):
        z, offsets, mask = _block_product(
            x_ptr, blocks_ptr, block, rows, tokens, in_features, SIZE, PADDED, PRECISION
        )
        q = _to_q(z, scale[:, None], zero_point[:, None], BITS)
        tl.store(q_ptr + offsets, q, mask)


@triton.jit
def _rows_kernel(
    z_ptr,
    hadamard_ptr,
    out_ptr,
    scales_ptr,
    zero_points_ptr,
    clip_ptr,
    in_features,
    SPANS: tl.constexpr,
    SIZE: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    QUANTIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply each span of one token by H, then quantize"""
    token = tl.program_id(0)
    start = token.to(tl.int64) * in_features
    low = tl.zeros((), tl.float32)
    high = tl.zeros((), tl.float32)
    if SPANS == 1:  # the only span stays in registers
        y, offsets, mask = _mixed(
            z_ptr, hadamard_ptr, start, 0, SIZE, INTERLEAVE, ROWS, COLUMNS, PRECISION
        )
        if QUANTIZE:
            low, high = _wider(low, high, y, None)
            scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
            tl.store(out_ptr + offsets, _to_q(y, scale, zero_point, BITS), mask)
        else:
            tl.store(out_ptr + offsets, _cast(y, out_ptr.dtype.element_ty), mask)
    else:
        for span in range(SPANS):
            y, offsets, mask = _mixed(
                z_ptr, hadamard_ptr, start, span, SIZE, INTERLEAVE, ROWS, COLUMNS, PRECISION
            )
            if QUANTIZE:
                low, high = _wider(low, high, y, None)
            else:
                tl.store(out_ptr + offsets, _cast(y, out_ptr.dtype.element_ty), mask)
        if QUANTIZE:
            scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
            for span in range(SPANS):
                y, offsets, mask = _mixed(
                    z_ptr, hadamard_ptr, start, span, SIZE, INTERLEAVE, ROWS, COLUMNS, PRECISION
                )
                tl.store(out_ptr + offsets, _to_q(y, scale, zero_point, BITS), mask)
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
    INTERLEAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply H by one span of a token, a (SIZE, INTERLEAVE) matrix"""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    start += span * SIZE * INTERLEAVE
    offsets = start + row * INTERLEAVE + column
    mask = (row < SIZE) & (column < INTERLEAVE)
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
                z_ptr + start + inner * INTERLEAVE + column,
                (inner < SIZE) & (column < INTERLEAVE),
                other=0.0,
            )
            product = _dot(hadamard, z, product, PRECISION)
    return product, offsets, mask


@triton.jit
def _wider(low, high, x, AXIS: tl.constexpr):
    """Widen ranges to hold x; NaN makes them infinite, for which :func:`_quantizer` looks"""
    x = tl.where(x == x, x, float("inf"))
    return tl.minimum(low, tl.min(x, AXIS)), tl.maximum(high, tl.max(x, AXIS))


@triton.jit
def _quantizer(low, high, clip_ptr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """
    Compute scale and zero point of a range, like reference.py. The scale of a range that is
    not finite is NaN
    """
    levels: tl.constexpr = 2**BITS - 1
    least: tl.constexpr = -(2 ** (BITS - 1))
    tiny: tl.constexpr = 1.1754943508222875e-38
    is_finite = tl.maximum(high, -low) < float("inf")
    if SYMMETRIC:
        half = tl.zeros_like(high) + levels / 2
        scale = tl.maximum(tl.div_rn(tl.maximum(high, -low), half), tiny)
        return tl.where(is_finite, scale, float("nan")), tl.zeros_like(scale)
    if clip_ptr is not None:
        ratio = tl.load(clip_ptr)
        # bounds which hold anyway: they keep the compiler from fusing a product with the
        # difference below, which would not round it
        low = tl.minimum(low * ratio, 0.0)
        high = tl.maximum(high * ratio, 0.0)
    scale = tl.maximum(tl.div_rn(high - low, tl.zeros_like(high) + levels), tiny)
    zero_point = least - tl.div_rn(low, scale)
    zero_point = _round(tl.minimum(tl.maximum(zero_point, least), least + levels))
    return tl.where(is_finite, scale, float("nan")), tl.where(is_finite, zero_point, 0.0)


@triton.jit
def _to_q(x, scale, zero_point, BITS: tl.constexpr):
    least: tl.constexpr = -(2 ** (BITS - 1))
    greatest: tl.constexpr = 2 ** (BITS - 1) - 1
    x, scale = tl.broadcast(x, scale)
    q = _round(tl.div_rn(x, scale) + zero_point)
    return tl.minimum(tl.maximum(q, least), greatest).to(tl.int8)


@triton.jit
def _round(x):
    """Round to the nearest integer, ties to even: adding 1.5 * 2^23 drops the fraction"""
    # larger numbers have no fraction, or are clamped later
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + 12582912.0) - 12582912.0
