# SPDX-License-Identifier: Apache-2.0
"""A vLLM linear layer whose input is transformed first"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.checkpoint.schema import TENSOR_SUFFIX, TRANSFORM_NAME, CATScheme
from cat_modifier.checkpoint.transform_module import online_hadamard, validate_transform
from cat_modifier.kernels.ops import PreparedTransform
from cat_modifier.integrations.vllm.int8_linear import CATIntScheme
from cat_modifier.integrations.vllm.compat import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)

__all__ = ["CATLinearMethod", "InputTransform"]


class InputTransform(Module):
    """
    Transform of the input of one layer, or of this rank's share of it. A merged layer
    (q/k/v, gate/up) has one.

    :param name: of the tensor in the checkpoint
    :param scheme: of the transform
    :param input_size: d, size of the whole input
    :param shard_size: size of the input on this rank
    :param shard_rank: of this rank
    :param dtype: of the input

    Attributes:
        weight: blocks on this rank, shape (shard_size / k, k, k); ``scheme.precision``
            while loading, then as :class:`PreparedTransform` wants them. None if there are
            none
        prepared: the transform; None until then
    """

    prepared: PreparedTransform | None = None

    def __init__(
        self,
        name: str,
        scheme: CATScheme,
        input_size: int,
        shard_size: int,
        shard_rank: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        block_size = scheme.block_size or 1
        if shard_size % block_size or shard_size % scheme.hadamard_size:
            shards = input_size // shard_size
            raise ValueError(
                f"{name} mixes more channels than the {shard_size} of one of {shards} tensor "
                "parallel shards. Serve the checkpoint with a smaller "
                "`--tensor-parallel-size`, or make it again with "
                f"CATModifier(tensor_parallel_size={shards})"
            )
        self.name = name
        self.is_loaded = False
        self.scheme = scheme
        self.dtype = dtype
        self.weight = None
        if scheme.block_size is None:
            return
        self.full_shape = (input_size // block_size, block_size, block_size)
        self.first_block = shard_rank * (shard_size // block_size)
        # NaN until loaded: a tensor which the checkpoint lacks does not go unnoticed
        blocks = torch.full(
            (shard_size // block_size, block_size, block_size),
            torch.nan,
            dtype=scheme.precision,
        )
        self.weight = Parameter(blocks, requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, param: Parameter, loaded: Tensor, shard_id: int | str | None = None):
        """
        vLLM's weight loader. All ranks read the whole tensor and keep their blocks.

        :param shard_id: which part of a merged layer the tensor is stored under
        """
        if self.is_loaded:
            raise ValueError(
                f"The checkpoint stores the transform tensor {self.name} a second time, under "
                "another Linear of the same merged layer: the checkpoint is damaged"
            )
        validate_transform(self.name, loaded, self.full_shape)
        self.is_loaded = True
        param.data.copy_(loaded.narrow(0, self.first_block, param.shape[0]))

    def process_weights_after_loading(self, device: torch.device):
        """
        :param device: of the layer
        """
        blocks, clip_ratio = None, None
        if self.weight is not None:
            validate_transform(self.name, self.weight, self.weight.shape)
            self.is_loaded = False  # other weights may be loaded later
            blocks = self.weight.data
        if self.scheme.clip_ratio < 1:
            clip_ratio = torch.tensor(
                self.scheme.clip_ratio, dtype=torch.float32, device=device
            )
        self.prepared = PreparedTransform.of(
            blocks,
            online_hadamard(self.scheme, device),
            self.scheme.interleave,
            self.dtype,
            clip_ratio,
        )
        if blocks is not None:
            self.weight = Parameter(self.prepared.blocks, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.prepared(x)


class TransformRegistry(Protocol):
    """What a linear method needs of the config of the model"""

    input_transforms: dict[str, InputTransform]

    def check_claimed(self): ...


@register_weight_loader_v2_supported_method
class CATLinearMethod(LinearMethodBase):
    """
    Applies an input transform, then another linear method.

    :param method: which vLLM would use without the transform
    :param scheme: of the transform
    :param owner: name of the Linear under which the checkpoint stores the transform
    :param is_owner: whether it is part of this layer. The transform is then a submodule of
        the layer; other layers which read the same input use it from there
    :param registry: of all transforms of the model, by owner
    """

    def __init__(
        self,
        method: LinearMethodBase,
        scheme: CATScheme,
        owner: str,
        is_owner: bool,
        registry: TransformRegistry,
    ):
        self.method = method
        self.scheme = scheme
        self.first = owner
        self.is_owner = is_owner
        self.registry = registry

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ):
        self.method.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        if self.is_owner:
            is_sharded = input_size_per_partition != input_size
            transform = InputTransform(
                self.first + TENSOR_SUFFIX,
                self.scheme,
                input_size,
                input_size_per_partition,
                layer.tp_rank if is_sharded else 0,
                params_dtype,
            )
            layer.register_module(TRANSFORM_NAME, transform)
            self.registry.input_transforms[self.first] = transform

    def process_weights_after_loading(self, layer: Module):
        self.registry.check_claimed()
        self.transform = self.registry.input_transforms[self.first]
        if self.is_owner:
            device = next(layer.parameters()).device
            self.transform.process_weights_after_loading(device)
        if isinstance(scheme := getattr(layer, "scheme", None), CATIntScheme):
            scheme.input_transform = self.transform  # fused with quantization there
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(getattr(layer, "scheme", None), CATIntScheme):
            x = self.transform(x)
        return self.method.apply(layer, x, bias)
