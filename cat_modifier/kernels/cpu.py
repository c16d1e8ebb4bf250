# SPDX-License-Identifier: Apache-2.0
"""
On CPUs: matrix products by oneDNN, and all that is left fused by PyTorch's compiler.

A single token is latency, not work: one kernel on one thread then does everything.
"""

from collections.abc import Callable
from functools import cache
from math import ceil

import torch
from torch import Tensor

from cat_modifier.kernels import reference

__all__ = ["quantize", "transform", "transform_quantize"]

_WORK_OF_ONE_THREAD = 2**22
"""Multiply-adds, some 50 microseconds of them, for which others are not woken"""

_OPERATIONS = 32
"""Of the quantization of a number"""

_CHUNK = 2**21
"""Numbers of a chunk of tokens: what is between its products stays in the cache"""


def transform(x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, stride: int) -> Tensor:
    """
    :param x: shape (tokens, d), dtype of all others
    :param blocks: see :func:`cat_modifier.kernels.reference.transform`, as for the others
    :return: shape (tokens, d)
    """
    return _transform(x, blocks, hadamard, stride).reshape(x.shape)


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
    if x.shape[0] == 1:
        work = 0 if blocks is None else blocks.numel()
        work += 0 if hadamard is None else x.numel() * hadamard.shape[0]
        is_parallel = work > _WORK_OF_ONE_THREAD
        shapes = tuple(None if m is None else m.shape for m in (x, blocks, hadamard))
        kind = (shapes, stride, num_bits, symmetric, clip_ratio is None)
        function = _compiled(_transform_quantize_one, is_parallel, kind)
        return function(x, blocks, hadamard, stride, num_bits, symmetric, clip_ratio)
    # of nearly the same size: one left over of a single token would be compiled anew
    chunks = [
        quantize(_transform(chunk, blocks, hadamard, stride), num_bits, symmetric, clip_ratio)
        for chunk in x.tensor_split(max(1, ceil(x.numel() / _CHUNK)))
    ]
    if len(chunks) == 1:
        return chunks[0]
    return tuple(
        None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)
    )


def quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    :param x: shape (tokens, d), or (tokens, ...) in any layout
    :return: see :func:`cat_modifier.kernels.reference.quantize_per_token`; codes have shape
        (tokens, d)
    """
    function = _compiled(_quantize, _OPERATIONS * x.numel() > _WORK_OF_ONE_THREAD)
    return function(x, num_bits, symmetric, clip_ratio)


def _quantize(
    x: Tensor, num_bits: int, symmetric: bool, clip_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scales, zero_points = reference.quantize_per_token(x, num_bits, symmetric, clip_ratio)
    return codes.flatten(1), scales, zero_points


def _transform(
    x: Tensor, blocks: Tensor | None, hadamard: Tensor | None, stride: int
) -> Tensor:
    """
    :return: shape (tokens, d/q, q), in the layout which the products leave behind
    """
    tokens, features = x.shape
    size = stride if blocks is None else blocks.shape[-1]
    count = features // size
    z = x.view(tokens, count, size).transpose(0, 1)
    if blocks is not None:
        z = torch.bmm(z, blocks.mT)
    if hadamard is None:
        return z.transpose(0, 1)
    # one product for all tokens, instead of one for each
    spans = x.shape[1] // (hadamard.shape[0] * stride)
    z = z.view(count, tokens, size // stride, stride).transpose(1, 2)
    z = hadamard @ z.reshape(spans, hadamard.shape[0], tokens * stride)
    return z.view(x.shape[1] // stride, tokens, stride).transpose(0, 1)


def _transform_quantize_one(
    x: Tensor,
    blocks: Tensor | None,
    hadamard: Tensor | None,
    stride: int,
    num_bits: int,
    symmetric: bool,
    clip_ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For one token; sums, which the compiler turns into loops, instead of products"""
    z = x.float()
    if blocks is not None:
        z = (blocks.float() * z.view(blocks.shape[0], 1, -1)).sum(-1)
    if hadamard is not None:
        spans = z.view(-1, 1, hadamard.shape[0], stride)
        z = (hadamard.float()[:, :, None] * spans).sum(2)
    return reference.quantize_per_token(z.reshape(1, -1), num_bits, symmetric, clip_ratio)


@cache
def _compiled(function: Callable, is_parallel: bool, kind: tuple | None = None) -> Callable:
    """
    :param kind: of inputs whose sizes are all known, for which loops are faster; None for any
    """
    options = {"cpp.dynamic_threads": True} if is_parallel else {"cpp.threads": 1}
    return torch.compile(
        function,
        fullgraph=True,
        dynamic=kind is None,
        options=options,
        # a process may serve layers of many kinds
        recompile_limit=64,
        isolate_recompiles=True,
    )
