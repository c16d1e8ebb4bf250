# SPDX-License-Identifier: Apache-2.0
"""
The kernels as operators of PyTorch, which its compiler and CUDA graphs can hold:
``torch.ops.cat_modifier.transform``, ``.transform_quantize`` and ``.quantize``.
"""

from dataclasses import dataclass
from functools import partial
from math import log2, sqrt

import torch
from torch import Tensor

from cat_modifier.kernels import cpu
from cat_modifier.functional.clipping import clip_tokens

__all__ = ["PreparedTransform", "quantize", "warm_up"]


@dataclass(frozen=True)
class PreparedTransform:
    """
    A transform, prepared for inputs of one dtype.

    :param blocks: T, shape (d/k, k, k); None if there are none
    :param hadamard: entries +-2^-e, which every dtype holds exactly, shape (p, p); None if
        there is none
    :param stride: q, distance of the channels which it multiplies
    :param gain: what is missing to an orthogonal matrix, between 1/sqrt(2) and sqrt(2)
    :param clip_ratio: of the range to that of the values, shape (), float32; None for 1
    :param dtype: in which all is computed
    """

    blocks: Tensor | None
    hadamard: Tensor | None
    stride: int
    gain: float
    clip_ratio: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        blocks: Tensor | None,
        hadamard: Tensor | None,
        stride: int,
        dtype: torch.dtype,
        clip_ratio: Tensor | None = None,
    ) -> "PreparedTransform":
        """
        :param blocks: as stored
        :param hadamard: orthogonal, shape (p, p); None if there is none
        :param dtype: of inputs. The transform is computed in it if it holds the stored
            blocks, down to 2^-24, and in float32 if not
        """
        if blocks is not None:
            rounded = blocks.to(dtype).to(blocks.dtype)
            # float16 has no smaller numbers; next to others in a row they count for nothing
            is_exact = torch.allclose(rounded, blocks, rtol=0, atol=2**-24)
            dtype = dtype if is_exact else torch.float32
            blocks = blocks.to(dtype).contiguous()
        gain = 1.0
        if hadamard is not None:
            root = sqrt(hadamard.shape[0])
            gain = 2 ** round(log2(root)) / root
            hadamard = (hadamard / gain).to(dtype)
        return cls(blocks, hadamard, stride, gain, clip_ratio, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """
        :param x: shape (..., d)
        :return: shape and dtype of x
        """
        out = x.reshape(-1, x.shape[-1]).to(self.dtype)
        if self.blocks is not None or self.hadamard is not None:
            out = torch.ops.cat_modifier.transform(out, self.blocks, self.hadamard, self.stride)
        if self.gain != 1:
            out = out * self.gain
        if self.clip_ratio is not None:
            out = clip_tokens(out.float(), self.clip_ratio)
        return out.to(x.dtype).reshape(x.shape)

    def quantize(
        self, x: Tensor, num_bits: int, symmetric: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Transform, then quantize.

        :param x: shape (tokens, d)
        :return: see :func:`quantize`
        """
        codes, scales, zero_points = torch.ops.cat_modifier.transform_quantize(
            x.to(self.dtype),
            self.blocks,
            self.hadamard,
            self.stride,
            num_bits,
            symmetric,
            self.clip_ratio,
        )
        if self.gain != 1:
            scales = scales * self.gain
        return codes, scales, None if symmetric else zero_points


def quantize(x: Tensor, num_bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """
    See :func:`cat_modifier.kernels.reference.quantize_per_token`, which this computes.

    :param x: shape (tokens, d), floating point
    :return: codes, shape (tokens, d), int8; scales, shape (tokens, 1), float32; zero
        points, shape (tokens, 1), int32, or None if symmetric
    """
    codes, scales, zero_points = torch.ops.cat_modifier.quantize(x, num_bits, symmetric, None)
    return codes, scales, None if symmetric else zero_points


_WARM_UP_TOKENS = {"cpu": (1, 2, 256), "cuda": (1, 32, 2048)}
"""One number for each of the ways in which kernels are launched"""

_warm: set[tuple] = set()
"""Inputs and transforms for which the kernels were compiled in this process"""


def warm_up(x: Tensor, num_bits: int, symmetric: bool, transform: PreparedTransform | None):
    """
    Compile the kernels before requests wait for them, once for all layers that are alike.

    :param x: like the inputs, shape (any, d)
    :param transform: of the input before it is quantized; None if there is none
    """
    alike = (x.shape[1], x.dtype, x.device, num_bits, symmetric)
    quantizer = quantize
    if transform is not None:
        quantizer = transform.quantize
        alike += (transform.stride, transform.dtype, transform.clip_ratio is None)
        for matrix in (transform.blocks, transform.hadamard):
            alike += (None if matrix is None else matrix.shape,)
    if alike in _warm:
        return
    _warm.add(alike)
    # what is compiled holds for one gradient mode and one default dtype: those of requests,
    # and not those of loading
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode():
            for tokens in _WARM_UP_TOKENS.get(x.device.type, ()):
                quantizer(x.new_zeros((tokens, x.shape[1])), num_bits, symmetric)
    finally:
        torch.set_default_dtype(default_dtype)


# operators return tensors and nothing else
def _with_zero_points(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if zero_points is None:
        zero_points = scales.new_empty((0, 1), dtype=torch.int32)
    return codes, scales, zero_points


def _on_gpu(function, *args):
    # Triton may not be installed on a machine without GPUs
    from cat_modifier.kernels import triton

    return function(triton, *args)


def _transform(kernels, x, blocks, hadamard, stride):
    return kernels.transform(x, blocks, hadamard, stride)


def _transform_quantize(kernels, *args):
    return _with_zero_points(*kernels.transform_quantize(*args))


def _quantize(kernels, *args):
    return _with_zero_points(*kernels.quantize(*args))


def _fake_transform(x, blocks, hadamard, stride):
    return torch.empty_like(x)


def _fake_codes(x, *args):
    tokens, (_, symmetric, _) = x.shape[0], args[-3:]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((tokens, 1), dtype=torch.float32),
        x.new_empty((0 if symmetric else tokens, 1), dtype=torch.int32),
    )


_TRANSFORM = "Tensor x, Tensor? blocks, Tensor? hadamard, int stride"
_FORMAT = "int num_bits, bool symmetric, Tensor? clip_ratio"

for _name, _schema, _function, _fake in (
    ("transform", f"({_TRANSFORM}) -> Tensor", _transform, _fake_transform),
    (
        "transform_quantize",
        f"({_TRANSFORM}, {_FORMAT}) -> (Tensor, Tensor, Tensor)",
        _transform_quantize,
        _fake_codes,
    ),
    (
        "quantize",
        f"(Tensor x, {_FORMAT}) -> (Tensor, Tensor, Tensor)",
        _quantize,
        _fake_codes,
    ),
):
    # not `torch.library.custom_op`: it would keep the compiler out of the kernels for CPUs
    _name = f"cat_modifier::{_name}"
    torch.library.define(_name, _schema)
    torch.library.register_fake(_name, _fake)
    torch.library.impl(_name, "CPU", partial(_function, cpu))
    torch.library.impl(_name, "CUDA", partial(_on_gpu, _function))
