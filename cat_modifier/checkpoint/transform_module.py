# SPDX-License-Identifier: Apache-2.0
"""The module that applies the online transform of an input."""

import math
from typing import Any

import torch
from compressed_tensors.offload import register_offload_module
from compressed_tensors.transform.factory.base import TransformBase
from compressed_tensors.utils import get_offloaded_device
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from cat_modifier.checkpoint.digest import tensor_digest
from cat_modifier.checkpoint.integers import suits_clipping
from cat_modifier.checkpoint.schema import (
    TRANSFORM_NAME,
    CATInput,
    CATScheme,
    CATTransformConfig,
)
from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.transform import apply_transform

__all__ = [
    "CATTransform",
    "absent",
    "attach_transforms",
    "online_hadamard",
    "validate_stored_transform",
    "validate_transform",
]


def online_hadamard(scheme: CATScheme, device: torch.device) -> Tensor | None:
    """
    Make the Hadamard matrix that follows the blocks.

    :param scheme: scheme with the order of the matrix
    :param device: device of the matrix
    :return: shape (p, p), float32; None if the scheme has none
    """
    if scheme.online_hadamard_size == 1:
        return None
    return hadamard_matrix(scheme.online_hadamard_size).to(device, torch.float32)


def absent(dtype: torch.dtype) -> float:
    """Get the number that stands for an element not loaded: no checkpoint holds it"""
    return -128 if dtype == torch.int8 else math.nan


def validate_transform(name: str, blocks: Tensor, shape: tuple[int, ...]):
    """
    Check a loaded transform tensor.

    :param name: name of the tensor, for the error
    :param blocks: T as stored, or the part of it that a rank applies
    :param shape: shape that the model needs
    :raises ValueError: if the shape differs, or an element is not one that T can have
    """
    if tuple(blocks.shape) != tuple(shape):
        raise ValueError(
            f"Transform tensor {name} has shape {tuple(blocks.shape)}, but the model needs "
            f"{tuple(shape)}: the checkpoint is damaged"
        )
    is_valid = blocks != absent(torch.int8) if blocks.dtype == torch.int8 else blocks.isfinite()
    if not is_valid.all():
        raise ValueError(
            f"Transform tensor {name} is missing from the checkpoint or holds values that "
            "are not finite, or -128: the checkpoint is damaged"
        )


def validate_stored_transform(
    name: str,
    blocks: Tensor,
    shape: tuple[int, ...],
    precision: torch.dtype,
    sha256: str | None,
):
    """
    Check a transform tensor as it is stored.

    :param name: name of the tensor, for the error
    :param blocks: T as stored
    :param shape: shape that the model needs
    :param precision: dtype that the config promises
    :param sha256: digest that the config promises; None to skip the check
    :raises ValueError: if shape, dtype or digest differ, or an element is not one that T can
        have
    """
    if blocks.dtype != precision:
        raise ValueError(
            f"Transform tensor {name} is stored as {blocks.dtype}, not {precision}: the "
            "checkpoint is damaged, or not the one whose config.json was read"
        )
    validate_transform(name, blocks, shape)
    if sha256 is not None and tensor_digest(blocks) != sha256:
        raise ValueError(
            f"Transform tensor {name} is not the one that was saved, by its SHA-256: the "
            "checkpoint is damaged, or holds files of two checkpoints. Copy or download it "
            "again"
        )


class CATTransform(TransformBase):
    """
    Transforms the input of one Linear, or of several Linears that share it.

    The module is a submodule of the first Linear. Hooks of all Linears call it.

    :param weight: T, shape (d/k, k, k), dtype ``scheme.precision``; None for no blocks
    :param scheme: sizes and clipping
    :param args: entry of the input in ``scheme.apply``
    """

    def __init__(self, weight: Parameter | None, scheme: CATScheme, args: CATInput):
        super().__init__()
        self.weight = weight
        self.scheme = scheme
        self.args = args
        self._hadamard: Tensor | None = None

    def forward(self, value: Tensor, is_clipped: bool = True) -> Tensor:
        """
        Transform and clip tokens.

        :param value: shape (..., d)
        :param is_clipped: whether to clip tokens; only tokens quantized next need it
        :return: shape and dtype of value
        """
        if self._hadamard is None or self._hadamard.device != value.device:
            self._hadamard = online_hadamard(self.scheme, value.device)
        blocks = None if self.weight is None else self.weight.to(value.device)
        # float32 for any dtype of the model: 16 bits would round after each step
        transformed = apply_transform(
            value.float(),
            blocks,
            self._hadamard,
            self.scheme.interleave,
            self.scheme.clip_ratio if is_clipped else 1.0,
        )
        return transformed.to(value.dtype)

    def input_hook(self, module: Module, args: tuple) -> tuple:
        """Transform the input of a Linear, as its forward pre-hook"""
        # same condition as in compressed-tensors
        is_quantized = getattr(module, "quantization_enabled", True) and all(
            getattr(module, f"quantization_{what}", None) is not None
            for what in ("scheme", "status")
        )
        return (self(args[0], is_quantized), *args[1:])

    def attach(self, linears: list[Linear]):
        """
        Make the transform a submodule of the first Linear, and a hook of each Linear.

        :param linears: Linears that read the input; the first holds the tensor
        """
        register_offload_module(linears[0], TRANSFORM_NAME, self)
        for linear in linears:
            # first: other hooks must see the transformed input
            linear.register_forward_pre_hook(self.input_hook, prepend=True)


def attach_transforms(model: Module, config: CATTransformConfig):
    """
    Attach all transforms of a checkpoint to a model whose weights are not loaded yet.

    :param model: model whose Linears have their quantization schemes
    :raises ValueError: if a targeted Linear does not exist, or does not suit its transform
    """
    modules = dict(model.named_modules())
    for scheme, args in config.inputs():
        for name in args.targets:
            if not hasattr(modules.get(name), "in_features"):
                raise ValueError(
                    f"The checkpoint has a transform for {name}, but the model has no "
                    "Linear of this name"
                )
            _check_clipping(name, modules[name], scheme)
        linears: list[Any] = [modules[name] for name in args.targets]
        _make_transform(linears[0], scheme, args).attach(linears)


def _make_transform(linear: Linear, scheme: CATScheme, args: CATInput) -> CATTransform:
    """
    Make the transform of an input, with a tensor to be loaded.

    :param linear: Linear that holds the tensor
    :param args: entry of the input in the scheme
    :raises ValueError: if the transform does not fit the Linear
    """
    size = scheme.block_size
    for what, span in (("blocks", size or 1), ("Hadamard spans", scheme.hadamard_size)):
        if linear.in_features % span:
            raise ValueError(
                f"{args.targets[0]} has {linear.in_features} inputs, which cannot be "
                f"divided into {what} of {span}: config.json is damaged, or is that of another "
                "checkpoint"
            )
    if size is None:
        return CATTransform(None, scheme, args)
    data = torch.empty(
        (linear.in_features // size, size, size),
        dtype=scheme.precision,
        device=get_offloaded_device(linear),
    )
    return CATTransform(Parameter(data, requires_grad=False), scheme, args)


def _check_clipping(name: str, linear: Module, scheme: CATScheme):
    quantization = getattr(linear, "quantization_scheme", None)
    inputs = None if quantization is None else quantization.input_activations
    if scheme.clip_ratio < 1 and not suits_clipping(inputs):
        raise ValueError(
            f"The checkpoint clips the input of {name}, but does not quantize it to "
            "asymmetric integers per token: the checkpoint is damaged"
        )
