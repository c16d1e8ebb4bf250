# SPDX-License-Identifier: Apache-2.0
"""The transform of a layer's input: loading it, and the part that this rank applies."""

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.checkpoint.schema import CATScheme
from cat_modifier.checkpoint.transform_module import online_hadamard, validate_transform
from cat_modifier.kernels.ops import OnlineTransform

__all__ = ["InputTransform"]


class InputTransform(Module):
    """
    Transform of the input of one layer, or of this rank's share of it. A merged layer
    (q/k/v, gate/up) has one.

    :param name: name of the tensor in the checkpoint
    :param scheme: sizes and clipping of the transform
    :param input_size: d, size of the whole input
    :param shard_size: size of the input on this rank
    :param shard_rank: index of this rank
    :param dtype: dtype of the input

    Attributes:
        weight: blocks of this rank, shape (shard_size / k, k, k), ``scheme.precision``; None
            where there are none, and once they are loaded
        online: the transform with all its tensors; None until they are loaded
    """

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
        self.online: OnlineTransform | None = None
        self.weight: Parameter | None = None
        if scheme.block_size is None:
            return
        self.full_shape = (input_size // block_size, block_size, block_size)
        self.first_block = shard_rank * (shard_size // block_size)
        # NaN until loaded: a tensor that the checkpoint lacks does not go unnoticed
        blocks = torch.full(
            (shard_size // block_size, block_size, block_size),
            torch.nan,
            dtype=scheme.precision,
        )
        self.weight = Parameter(blocks, requires_grad=False)
        self.weight.weight_loader = self.load

    def load(self, param: Parameter, loaded: Tensor, shard_id: int | str | None = None):
        """
        Load the blocks of this rank, as vLLM's weight loader. Each rank reads the whole tensor.

        :param shard_id: part of a merged layer that the tensor is stored under
        :raises ValueError: if the tensor does not fit, or comes a second time
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
        :param device: device of the layer
        :raises ValueError: if the tensor was not loaded
        """
        blocks = None
        if self.weight is not None:
            validate_transform(self.name, self.weight, self.weight.shape)
            blocks = self.weight.data
        self.online = OnlineTransform(
            blocks,
            online_hadamard(self.scheme, device),
            self.scheme.interleave,
            self.dtype,
            self.scheme.clip_ratio,
        ).to(device)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: shape (..., shard_size)
        :return: shape and dtype of x
        """
        assert self.online is not None
        return self.online(x)
