# SPDX-License-Identifier: Apache-2.0
"""
The kernels as PyTorch operators, for torch.compile and CUDA graphs:
``torch.ops.cat_modifier.transform``, ``.transform_quantize`` and ``.quantize``.
"""

from functools import partial
from math import log2, sqrt

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.functional.clipping import clip_tokens
from cat_modifier.kernels import cpu

__all__ = ["OnlineTransform", "quantize", "warm_up"]


class OnlineTransform(Module):
    """
    The transform of one input: blocks, then the Hadamard matrix, then clipping.

    All tensors are parameters or buffers, so that vLLM can offload and reload them.

    :param blocks: T as stored, shape (d/k, k, k); None for none
    :param hadamard: orthogonal matrix, shape (p, p); None for none
    :param interleave: q, distance of the channels that ``hadamard`` multiplies
    :param dtype: dtype of the input
    :param clip_ratio: clipped range of each token, relative to the range of its values and
        zero; 1 does not clip

    Attributes:
        weight: parameter, T, shape (d/k, k, k), int8 if it is stored so, else dtype
            :attr:`dtype`; None for none
        hadamard: buffer, ``hadamard / norm_scale``, shape (p, p), dtype :attr:`dtype`.
            Entries are +-2^-e, exact in every dtype; None for none
        clip_ratio: buffer, shape (), float32; None for 1
        norm_scale: factor left out of the buffer, between 1/sqrt(2) and sqrt(2)
        dtype: dtype to compute in, see :func:`_compute_dtype`
    """

    hadamard: Tensor | None
    clip_ratio: Tensor | None

    def __init__(
        self,
        blocks: Tensor | None,
        hadamard: Tensor | None,
        interleave: int,
        dtype: torch.dtype,
        clip_ratio: float = 1.0,
    ):
        super().__init__()
        self.interleave = interleave
        self.dtype = dtype if blocks is None else _compute_dtype(blocks.dtype, dtype)
        self.weight = None
        if blocks is not None:
            stored = torch.int8 if blocks.dtype == torch.int8 else self.dtype
            self.weight = Parameter(blocks.to(stored).contiguous(), requires_grad=False)
        self.norm_scale, clip = 1.0, None
        if hadamard is not None:
            root = sqrt(hadamard.shape[0])
            self.norm_scale = 2 ** round(log2(root)) / root
            hadamard = (hadamard / self.norm_scale).to(self.dtype)
        if clip_ratio < 1:
            clip = torch.tensor(clip_ratio, dtype=torch.float32)
        # not persistent: no checkpoint holds them, and vLLM's reload of weights keeps them
        self.register_buffer("hadamard", hadamard, persistent=False)
        self.register_buffer("clip_ratio", clip, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """
        Transform and clip tokens.

        :param x: shape (..., d), floating point
        :return: shape and dtype of x
        """
        out = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if self.weight is not None or self.hadamard is not None:
            out = torch.ops.cat_modifier.transform(
                out, self.weight, self.hadamard, self.interleave
            )
        if self.norm_scale != 1:
            out = out * self.norm_scale
        if self.clip_ratio is not None:
            out = clip_tokens(out.float(), self.clip_ratio)
        return out.to(x.dtype).reshape(x.shape)

    def quantize(
        self, x: Tensor, num_bits: int, symmetric: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Transform, then quantize.

        :param x: shape (tokens, d), floating point
        :return: see :func:`quantize`
        """
        q, scales, zero_points = torch.ops.cat_modifier.transform_quantize(
            x.to(self.dtype),
            self.weight,
            self.hadamard,
            self.interleave,
            num_bits,
            symmetric,
            self.clip_ratio,
        )
        if self.norm_scale != 1:
            scales = scales * self.norm_scale
        return q, scales, None if symmetric else zero_points


def _compute_dtype(stored: torch.dtype, inputs: torch.dtype) -> torch.dtype:
    """Choose the dtype of the inputs if it holds the stored blocks, else float32"""
    # float16 holds all of bfloat16 but its extremes. Values below 2^-24 do not matter beside
    # the other values of a row
    if stored == torch.int8 or (stored, inputs) == (torch.bfloat16, torch.float16):
        return inputs
    return torch.promote_types(stored, inputs)


def quantize(x: Tensor, num_bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    Compute :func:`cat_modifier.kernels.reference.quantize_per_token`.

    :param x: shape (tokens, d), floating point
    :param num_bits: bits of an integer, at most 8
    :param symmetric: whether there are no zero points
    :return: q, shape (tokens, d), int8; scales, shape (tokens, 1), float32; zero points,
        shape (tokens, 1), int32, or None if symmetric
    """
    q, scales, zero_points = torch.ops.cat_modifier.quantize(x, num_bits, symmetric, None)
    return q, scales, None if symmetric else zero_points


_WARM_UP_TOKENS = {"cpu": (1,), "cuda": (1, 32, 2048)}
"""Numbers of tokens, one for each way to launch the kernels"""

_warm: set[tuple] = set()
"""Kinds of inputs and transforms for which this process has compiled the kernels"""


def warm_up(x: Tensor, num_bits: int, symmetric: bool, transform: OnlineTransform | None):
    """
    Compile the kernels before the first request, once for all layers of one kind.

    :param x: tensor of the inputs' dtype and device, shape (any, d)
    :param transform: transform of the input; None to quantize without a transform
    """
    kind: tuple = (x.shape[1], x.dtype, x.device, num_bits, symmetric)
    quantizer = quantize
    if transform is not None:
        quantizer = transform.quantize
        kind += (transform.interleave, transform.dtype, transform.clip_ratio is None)
        for matrix in (transform.weight, transform.hadamard):
            kind += (None if matrix is None else (matrix.shape, matrix.dtype),)
    if kind in _warm:
        return
    _warm.add(kind)
    with torch.inference_mode():
        for tokens in _WARM_UP_TOKENS.get(x.device.type, ()):
            quantizer(x.new_zeros((tokens, x.shape[1])), num_bits, symmetric)


# operators cannot return None
def _with_zero_points(
    q: Tensor, scales: Tensor, zero_points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if zero_points is None:
        zero_points = scales.new_empty((0, 1), dtype=torch.int32)
    return q, scales, zero_points


def _on_gpu(function, *args):
    # Triton may not be installed on a machine without GPUs
    from cat_modifier.kernels import triton

    return function(triton, *args)


def _transform(kernels, *args):
    return kernels.transform(*args)


def _transform_quantize(kernels, *args):
    return _with_zero_points(*kernels.transform_quantize(*args))


def _quantize(kernels, *args):
    return _with_zero_points(*kernels.quantize(*args))


def _fake_transform(x, *args):
    return x.new_empty(x.shape)


def _fake_quantize(x, *args):
    tokens, (_, symmetric, _) = x.shape[0], args[-3:]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((tokens, 1), dtype=torch.float32),
        x.new_empty((0 if symmetric else tokens, 1), dtype=torch.int32),
    )


_TRANSFORM = "Tensor x, Tensor? blocks, Tensor? hadamard, int interleave"
_FORMAT = "int num_bits, bool symmetric, Tensor? clip_ratio"

for _name, _schema, _function, _fake in (
    ("transform", f"({_TRANSFORM}) -> Tensor", _transform, _fake_transform),
    (
        "transform_quantize",
        f"({_TRANSFORM}, {_FORMAT}) -> (Tensor, Tensor, Tensor)",
        _transform_quantize,
        _fake_quantize,
    ),
    (
        "quantize",
        f"(Tensor x, {_FORMAT}) -> (Tensor, Tensor, Tensor)",
        _quantize,
        _fake_quantize,
    ),
):
    _name = f"cat_modifier::{_name}"
    torch.library.define(_name, _schema)
    torch.library.register_fake(_name, _fake)
    torch.library.impl(_name, "CPU", partial(_function, cpu))
    torch.library.impl(_name, "CUDA", partial(_on_gpu, _function))
