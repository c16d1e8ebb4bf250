# SPDX-License-Identifier: Apache-2.0
"""
Kernels for CPUs: oneDNN multiplies matrices, PyTorch's compiler fuses the rest.

Latency dominates for a single token, so that one compiled kernel computes everything.
"""

from collections.abc import Callable
from functools import cache
from math import ceil

import torch
from torch import Tensor

from cat_modifier.kernels import reference

__all__ = ["quantize", "transform", "transform_quantize"]

_WORK_OF_ONE_THREAD = 2**22
"""Multiply-adds, about 50 microseconds. Less work does not pay for waking other threads"""

_OPERATIONS = 32
"""Operations to quantize one value"""

_CHUNK = 2**21
"""Values in a chunk of tokens. Intermediate results of this size stay in the cache"""


def transform(
    x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, interleave: int
) -> Tensor:
    """
    Multiply tokens by the blocks, then by the Hadamard matrix.

    :param x: shape (tokens, d)
    :param blocks: T, shape (d/k, k, k), dtype of x; None for none
    :param hadamard: shape (p, p), dtype of x; None for none
    :param interleave: q, distance of the channels that ``hadamard`` multiplies
    :return: shape (tokens, d)
    """
    return _transform(x, blocks, hadamard, interleave).reshape(x.shape)


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
    if x.shape[0] == 1:
        work = 0 if blocks is None else blocks.numel()
        work += 0 if hadamard is None else x.numel() * hadamard.shape[0]
        is_parallel = work > _WORK_OF_ONE_THREAD
        shapes = tuple(None if m is None else m.shape for m in (x, blocks, hadamard))
        kind = (shapes, interleave, num_bits, symmetric, clip_ratio is None)
        function = _compiled(_transform_quantize_one, is_parallel, kind)
        return function(x, blocks, hadamard, interleave, num_bits, symmetric, clip_ratio)
    # chunks of nearly equal size: a last chunk of a single token would compile again
    chunks = [
        quantize(
            _transform(chunk, blocks, hadamard, interleave), num_bits, symmetric, clip_ratio
        )
        for chunk in x.tensor_split(max(1, ceil(x.numel() / _CHUNK)))
    ]
    if len(chunks) == 1:
        return chunks[0]
    q, scales, zero_points = zip(*chunks, strict=True)
    return torch.cat(q), torch.cat(scales), None if symmetric else torch.cat(zero_points)


def quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Quantize with one dynamic scale per token.

    :param x: shape (tokens, d), or (tokens, ...) in any layout
    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`, with q of shape
        (tokens, d)
    """
    function = _compiled(_quantize, _OPERATIONS * x.numel() > _WORK_OF_ONE_THREAD)
    return function(x, num_bits, symmetric, clip_ratio)


def _quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q, scales, zero_points = reference.quantize_per_token(x, num_bits, symmetric, clip_ratio)
    return q.flatten(1), scales, zero_points


def _transform(
    x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, interleave: int
) -> Tensor:
    """
    Transform without copying the result to another memory layout.

    :return: shape (tokens, d/q, q), not contiguous
    """
    tokens, in_features = x.shape
    size = interleave if blocks is None else blocks.shape[-1]
    count = in_features // size
    z = x.view(tokens, count, size).transpose(0, 1)
    if blocks is not None:
        z = torch.bmm(z, blocks.mT)
    if hadamard is None:
        return z.transpose(0, 1)
    # one product for all tokens, instead of one product per token
    order = hadamard.shape[0]
    spans = in_features // (order * interleave)
    z = z.view(count, tokens, size // interleave, interleave).transpose(1, 2)
    z = hadamard @ z.reshape(spans, order, tokens * interleave)
    return z.view(in_features // interleave, tokens, interleave).transpose(0, 1)


def _transform_quantize_one(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None,
    interleave: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Transform and quantize one token. The compiler turns the sums into loops"""
    z = x.float()
    if blocks is not None:
        z = (blocks.float() * z.view(blocks.shape[0], 1, -1)).sum(-1)
    if hadamard is not None:
        spans = z.view(-1, 1, hadamard.shape[0], interleave)
        z = (hadamard.float()[:, :, None] * spans).sum(2)
    return reference.quantize_per_token(z.reshape(1, -1), num_bits, symmetric, clip_ratio)


@cache
def _compiled(function: Callable, is_parallel: bool, kind: tuple | None = None) -> Callable:
    """
    Compile a function.

    :param is_parallel: whether several threads share the work
    :param kind: all sizes of the inputs, for faster loops; None to compile for any size
    """
    options = {"cpp.dynamic_threads": True} if is_parallel else {"cpp.threads": 1}
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack the last two
        function,
        fullgraph=True,
        dynamic=kind is None,
        options=options,
        # one process may run layers of many kinds
        recompile_limit=64,
        isolate_recompiles=True,
    )
