# SPDX-License-Identifier: Apache-2.0
"""The online transform of a group of Linears, as a module and as a compressed-tensors type"""

import torch
from compressed_tensors.offload import register_offload_module
from compressed_tensors.transform import TransformArgs, TransformFactory
from compressed_tensors.transform.factory.base import TransformBase
from compressed_tensors.utils import get_offloaded_device
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from cat_modifier.checkpoint.schema import (
    TRANSFORM_NAME,
    TRANSFORM_TYPE,
    CATScheme,
    CATTransformConfig,
)
from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.transform import apply_transform

__all__ = [
    "CATFactory",
    "CATTransform",
    "attach_transforms",
    "expected_tensors",
    "online_hadamard",
    "validate_transform",
]


def online_hadamard(scheme: CATScheme, device: torch.device) -> Tensor | None:
    """
    Make the Hadamard matrix that follows the blocks.

    :return: shape (p, p), float32; None if the scheme has none
    """
    if scheme.online_hadamard_size == 1:
        return None
    return hadamard_matrix(scheme.online_hadamard_size).to(device, torch.float32)


def validate_transform(name: str, blocks: Tensor, shape: tuple[int, ...]):
    """
    :param name: of the tensor, for the error
    :param blocks: transform as loaded
    :param shape: which it should have
    :raises ValueError: if it has not, or if any element is not finite
    """
    if tuple(blocks.shape) != tuple(shape):
        raise ValueError(
            f"Transform tensor {name} has shape {tuple(blocks.shape)}, but the model needs "
            f"{tuple(shape)}: the checkpoint is damaged"
        )
    if not torch.isfinite(blocks).all():
        raise ValueError(
            f"Transform tensor {name} is missing from the checkpoint or holds values that "
            "are not finite: the checkpoint is damaged"
        )


class CATTransform(TransformBase):
    """
    Transforms the input of a group of Linears. It is a submodule of the first Linear of
    the group alone; the others call it through their hooks.

    :param weight: blocks, shape (d/k, k, k); None if ``scheme.block_size`` is
    :param scheme: scheme of the group
    :param args: the group

    Attributes:
        weight: shape (d/k, k, k), dtype ``scheme.precision``; None if there are no blocks
    """

    def __init__(self, weight: Parameter | None, scheme: CATScheme, args: TransformArgs):
        super().__init__()
        self.weight = weight
        self.scheme = scheme
        self.args = args
        self._hadamard: Tensor | None = None

    def forward(self, value: Tensor, is_clipped: bool = True) -> Tensor:
        """
        :param value: shape (..., d)
        :param is_clipped: whether it is quantized next
        """
        if self._hadamard is None or self._hadamard.device != value.device:
            self._hadamard = online_hadamard(self.scheme, value.device)
        blocks = None if self.weight is None else self.weight.to(value.device)
        # float32 whatever the dtype of the model: 16 bits would round twice
        transformed = apply_transform(
            value.float(),
            blocks,
            self._hadamard,
            self.scheme.interleave,
            self.scheme.clip_ratio if is_clipped else 1.0,
        )
        return transformed.to(value.dtype)

    def input_hook(self, module: Module, args: tuple) -> tuple:
        """Forward pre-hook of every Linear of the group"""
        # as compressed-tensors decides it
        is_quantized = getattr(module, "quantization_enabled", True) and all(
            getattr(module, f"quantization_{what}", None) is not None
            for what in ("scheme", "status")
        )
        return (self(args[0], is_quantized), *args[1:])

    def attach(self, linears: list[Linear]):
        """
        :param linears: the Linears of the group, the one which holds the tensor first
        """
        register_offload_module(linears[0], TRANSFORM_NAME, self)
        for linear in linears:
            # before all other hooks: they must see the input that is quantized
            linear.register_forward_pre_hook(self.input_hook, prepend=True)


@TransformFactory.register(TRANSFORM_TYPE)
class CATFactory(TransformFactory):
    """
    Attaches the transforms of one scheme to a model, to be filled from a checkpoint.
    """

    scheme: CATScheme

    def create_transform(self, module: Linear, args: TransformArgs) -> CATTransform:
        """
        :param module: Linear which holds the tensor
        :param args: the group
        :raises ValueError: if the transform does not fit the Linear
        """
        size = self.scheme.block_size
        for what, span in (
            ("blocks", size or 1),
            ("Hadamard spans", self.scheme.hadamard_size),
        ):
            if module.in_features % span:
                raise ValueError(
                    f"{args.targets[0]} has {module.in_features} inputs, which cannot be "
                    f"divided into {what} of {span}"
                )
        if size is None:
            return CATTransform(None, self.scheme, args)
        data = torch.empty(
            (module.in_features // size, size, size),
            dtype=self.scheme.precision,
            device=get_offloaded_device(module),
        )
        weight = Parameter(data, requires_grad=self.scheme.requires_grad)
        return CATTransform(weight, self.scheme, args)

    def apply_to_model(self, model: Module, use_tqdm: bool = True):
        """
        :param model: with all Linears which the scheme targets
        :raises ValueError: if there is no Linear of a targeted name
        """
        modules = dict(model.named_modules())
        for args in self.scheme.apply:
            for name in args.targets:
                if not hasattr(modules.get(name), "in_features"):
                    raise ValueError(
                        f"The checkpoint has a transform for {name}, but the model has no "
                        "Linear of this name"
                    )
            linears = [modules[name] for name in args.targets]
            self.create_transform(linears[0], args).attach(linears)


def attach_transforms(model: Module, config: CATTransformConfig):
    """
    Attach all transforms of a checkpoint to a model whose weights are not loaded yet.

    :raises ValueError: if they do not fit the model
    """
    for name, scheme in config.config_groups.items():
        TransformFactory.from_scheme(scheme, name=name).apply_to_model(model)


def expected_tensors(model: Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all transform tensors that a checkpoint of the model holds, by name"""
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, CATTransform) and module.weight is not None
    }
