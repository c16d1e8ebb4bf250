# SPDX-License-Identifier: Apache-2.0
"""
Kernels for GPUs, in Triton: the transform and quantization.

There are two kernels. The first computes the blocks of all tokens in parallel. The second
multiplies by the Hadamard matrix and quantizes, one program per token: a multiprocessor holds
one row of 14336 channels, as a (p, q) matrix for the tensor cores, but not the 16 rows that
the product with a block needs. The L2 cache holds the result of the first kernel, unless
there are many tokens. A single kernel would have to compute all blocks twice, for the range
and to quantize, which takes longer than a round trip through memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cat_modifier.functional.stored import STEP, dequantize_blocks
from cat_modifier.functional.transform import apply_blocks

__all__ = ["quantize", "transform", "transform_quantize"]

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_UNIT = tl.constexpr(STEP)
"""T of a block of int8 ones"""

_LARGEST_BLOCK = 256
"""Channels of the largest block of our kernels. cuBLAS is as fast for larger ones"""

_MANY_TOKENS = 1024
"""Number of tokens whose programs fill a GPU"""


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
    out = torch.empty_like(z)
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
    z = _block_products(x, blocks)
    return _quantize_rows(z, hadamard, interleave, num_bits, symmetric, clip_ratio)


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
    options = block_options(size, tokens, x.element_size())
    if tokens:
        grid = (
            in_features // size,
            triton.cdiv(tokens, options["TILE"]),
            triton.cdiv(size, options["OUTPUTS"]),
        )
        _blocks_kernel[grid](
            x,
            blocks,
            z,
            tokens,
            in_features,
            SIZE=size,
            PRECISION=_precision(x),
            **options,
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
            BITS=num_bits,
            SYMMETRIC=symmetric,
            QUANTIZE=scales is not None,
            PRECISION=_precision(z),
            **row_options(size, interleave, tokens, z.element_size()),
        )


def block_options(size: int, tokens: int, item_size: int) -> dict[str, int]:
    """
    Choose what one program of the blocks kernel computes.

    :param item_size: bytes of an input
    :return: keyword arguments of :func:`_blocks_kernel`
    """
    padded = _padded(size)
    # few tokens: more programs, which read fewer rows of a block each
    tile, outputs = (16, 32) if tokens <= 16 else (64, 128)
    return {
        "TILE": tile,
        "OUTPUTS": min(padded, outputs),
        "STEP": min(padded, 256 // item_size),
        "num_warps": 4,
    }


def row_options(size: int, interleave: int, tokens: int, item_size: int) -> dict[str, int]:
    """
    Choose the shape of a span in registers, and how many threads hold it.

    :param size: p, order of the Hadamard matrix; 1 for none
    :param item_size: bytes of an input
    :return: keyword arguments of :func:`_rows_kernel`
    """
    rows = 1 if size == 1 else _padded(size)
    columns = max(64, triton.next_power_of_2(interleave)) if size == 1 else _padded(interleave)
    elements = rows * columns
    warps = 4 if elements <= 8192 else 8 if elements <= 16384 else 16
    if tokens >= _MANY_TOKENS:
        # fewer threads take longer for a token, but more programs run at once
        warps = max(4, warps // 2)
    # each stage of a loop over spans holds all of H and a span in shared memory
    stages = 3 if 3 * rows * (rows + columns) * item_size <= 96 * 1024 else 1
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "STEP": min(rows, 128 // item_size, max(16, 32 * 1024 // (rows * item_size))),
        "STAGES": stages,
        "num_warps": warps,
    }


def _outputs(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return q, scales, None if symmetric else torch.empty_like(scales, dtype=torch.int32)


def _padded(size: int) -> int:
    """Round up to a size that tensor cores multiply"""
    return max(16, triton.next_power_of_2(size))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


# each number of tokens specializes a kernel otherwise, and warm_up would miss most of them
@triton.jit(do_not_specialize=["tokens"])
def _blocks_kernel(
    x_ptr,
    blocks_ptr,
    z_ptr,
    tokens,
    in_features,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Compute z = x T^T for TILE tokens and OUTPUTS channels of one block. STEP channels are
    summed at once, which bounds the shared memory
    """
    block = tl.program_id(0)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    outputs = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    # 64 bits: offsets of 131,072 tokens of 16,384 channels overflow 32 bits
    start = rows.to(tl.int64)[:, None] * in_features + block * SIZE
    is_token = (rows < tokens)[:, None]
    z = tl.zeros((TILE, OUTPUTS), tl.float32)
    for first in tl.static_range(0, SIZE, STEP):
        inputs = first + tl.arange(0, STEP)
        x = tl.load(x_ptr + start + inputs, is_token & (inputs < SIZE), other=0.0)
        weight = tl.load(
            blocks_ptr + block * SIZE * SIZE + outputs * SIZE + inputs[:, None],
            (inputs < SIZE)[:, None] & (outputs < SIZE),
            other=0,
        )
        z = _dot(x, weight, z, PRECISION)
    if blocks_ptr.dtype.element_ty == tl.int8:
        z *= _UNIT
    mask = is_token & (outputs < SIZE)
    tl.store(z_ptr + start + outputs, _cast(z, z_ptr.dtype.element_ty), mask)


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
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
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
            z_ptr, hadamard_ptr, start, 0, SIZE, INTERLEAVE, ROWS, COLUMNS, STEP, PRECISION
        )
        if QUANTIZE:
            low, high = _wider(low, high, y)
            scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
            tl.store(out_ptr + offsets, _to_q(y, scale, zero_point, BITS), mask)
        else:
            tl.store(out_ptr + offsets, _cast(y, out_ptr.dtype.element_ty), mask)
    else:
        for span in tl.range(0, SPANS, num_stages=STAGES):
            y, offsets, mask = _mixed(
                z_ptr,
                hadamard_ptr,
                start,
                span,
                SIZE,
                INTERLEAVE,
                ROWS,
                COLUMNS,
                STEP,
                PRECISION,
            )
            if QUANTIZE:
                low, high = _wider(low, high, y)
            else:
                tl.store(out_ptr + offsets, _cast(y, out_ptr.dtype.element_ty), mask)
        if QUANTIZE:
            scale, zero_point = _quantizer(low, high, clip_ptr, BITS, SYMMETRIC)
            for span in tl.range(0, SPANS, num_stages=STAGES):
                y, offsets, mask = _mixed(
                    z_ptr,
                    hadamard_ptr,
                    start,
                    span,
                    SIZE,
                    INTERLEAVE,
                    ROWS,
                    COLUMNS,
                    STEP,
                    PRECISION,
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
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply H by one span of a token, a (SIZE, INTERLEAVE) matrix, STEP rows at once"""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    start += span * SIZE * INTERLEAVE
    offsets = start + row * INTERLEAVE + column
    mask = (row < SIZE) & (column < INTERLEAVE)
    if SIZE == 1:
        product = tl.load(z_ptr + offsets, mask, other=0.0).to(tl.float32)
    else:
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        z_ptr += start + column
        hadamard_ptr += row * SIZE
        if SIZE <= 128:
            for first in tl.static_range(0, SIZE, STEP):
                product = _sum_rows(
                    product,
                    z_ptr,
                    hadamard_ptr,
                    first,
                    SIZE,
                    INTERLEAVE,
                    COLUMNS,
                    STEP,
                    PRECISION,
                )
        else:
            # a loop at run time: the compiler would keep all of H in shared memory
            for first in tl.range(0, SIZE, STEP, num_stages=1):
                product = _sum_rows(
                    product,
                    z_ptr,
                    hadamard_ptr,
                    first,
                    SIZE,
                    INTERLEAVE,
                    COLUMNS,
                    STEP,
                    PRECISION,
                )
    return product, offsets, mask


@triton.jit
def _sum_rows(
    product,
    z_ptr,
    hadamard_ptr,
    first,
    SIZE: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Add STEP columns of H times as many rows of a span

    :param z_ptr: the columns of the span's first row
    :param hadamard_ptr: the rows of H
    """
    inner = first + tl.arange(0, STEP)
    row = tl.arange(0, product.shape[0])[:, None]
    hadamard = tl.load(hadamard_ptr + inner, (row < SIZE) & (inner < SIZE), other=0.0)
    inner = inner[:, None]
    mask = (inner < SIZE) & (tl.arange(0, COLUMNS) < INTERLEAVE)
    z = tl.load(z_ptr + inner * INTERLEAVE, mask, other=0.0)
    return _dot(hadamard, z, product, PRECISION)


@triton.jit
def _wider(low, high, x):
    """Widen a range to hold x; NaN makes it infinite, for which :func:`_quantizer` looks"""
    x = tl.where(x == x, x, float("inf"))
    return tl.minimum(low, tl.min(x)), tl.maximum(high, tl.max(x))


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
    q = _round(_quotient(x, scale) + zero_point)
    return tl.minimum(tl.maximum(q, least), greatest).to(tl.int8)


@triton.jit
def _quotient(x, scale):
    """
    Divide by a scalar as ``tl.div_rn`` does, to the bit for quotients of 1/8 or more. Smaller
    ones round to zero anyway
    """
    x, scales = tl.broadcast(x, scale)
    if _IS_INTERPRETED:  # the interpreter rounds the products of FMAs
        q = tl.div_rn(x, scales)
    elif (scale > 1e-30) & (scale < 1e30):
        # Markstein, Computation of elementary functions on the IBM RISC System/6000 processor
        # (1990): with the reciprocal rounded to nearest, the inner FMA computes the remainder
        # of an approximate quotient, and the outer one corrects the quotient by it. No step
        # overflows, and a remainder that underflows belongs to a quotient below 1/8
        reciprocal = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
        x, reciprocals = tl.broadcast(x, reciprocal)
        q = x * reciprocals
        q = tl.fma(tl.fma(-q, scales, x), reciprocals, q)
    else:  # NaN, too
        q = tl.div_rn(x, scales)
    return q


@triton.jit
def _round(x):
    """Round to the nearest integer, ties to even: adding 1.5 * 2^23 drops the fraction"""
    # larger numbers have no fraction, or are clamped later
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + 12582912.0) - 12582912.0
