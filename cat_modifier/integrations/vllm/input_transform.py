# SPDX-License-Identifier: Apache-2.0
"""The transform of a layer's input: loading it, and the part that this rank applies."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from cat_modifier.checkpoint.schema import CATScheme
from cat_modifier.checkpoint.transform_module import (
    absent,
    online_hadamard,
    validate_stored_transform,
    validate_transform,
)
from cat_modifier.functional.stored import dequantize_blocks
from cat_modifier.kernels.ops import OnlineTransform

__all__ = ["InputTransform", "add_loader"]


def add_loader(weight: Parameter, load: Callable):
    """Let vLLM load a parameter, or fill it if it makes weights up: it skips integers"""
    weight.weight_loader = load  # type: ignore[attr-defined]
    if weight.dtype == torch.int8:
        weight.dummy_weight_value = 1  # type: ignore[attr-defined]


class InputTransform(OnlineTransform):
    """
    Transform of the input of one layer, or of this rank's share of it. A merged layer
    (q/k/v, gate/up) has one.

    Tensors have their final form before they are loaded: vLLM can load them again, offload
    them, and put them to sleep.

    :param name: name of the tensor in the checkpoint
    :param scheme: sizes and clipping of the transform
    :param input_size: d, size of the whole input
    :param shard_size: size of the input on this rank
    :param shard_rank: index of this rank
    :param dtype: dtype of the input
    :param sha256: digest of the tensor; None to skip the check
    :param keeps_int8: whether blocks in int8 stay so, which the kernels read that quantize.
        Others would convert them in each call
    :raises ValueError: if a block, or the Hadamard matrix, does not fit the input, or a rank
    """

    def __init__(
        self,
        name: str,
        scheme: CATScheme,
        input_size: int,
        shard_size: int,
        shard_rank: int,
        dtype: torch.dtype,
        sha256: str | None = None,
        keeps_int8: bool = True,
    ):
        size = scheme.block_size or 1
        if input_size % size or input_size % scheme.hadamard_size:
            raise ValueError(
                f"{name} does not fit a layer that has {input_size} inputs: config.json is "
                "damaged, or is that of another checkpoint"
            )
        if shard_size % size or shard_size % scheme.hadamard_size:
            shards = input_size // shard_size
            raise ValueError(
                f"{name} mixes more channels than the {shard_size} of one of {shards} tensor "
                "parallel shards. Serve the checkpoint with a smaller "
                "`--tensor-parallel-size`, or make it again with "
                f"CATModifier(tensor_parallel_size={shards})"
            )
        blocks, count = None, shard_size // size
        if scheme.block_size is not None:
            is_int8 = scheme.precision == torch.int8
            held = dtype if is_int8 and not keeps_int8 else scheme.precision
            # a tensor that the checkpoint lacks does not go unnoticed
            blocks = torch.empty((count, size, size), dtype=held).fill_(absent(held))
        hadamard = online_hadamard(scheme, torch.get_default_device())
        super().__init__(blocks, hadamard, scheme.interleave, dtype, scheme.clip_ratio)
        self.name, self._precision, self._sha256 = name, scheme.precision, sha256
        self.full_shape = (input_size // size, size, size)
        self.first_block = shard_rank * count
        self._shard_id: int | str | None = None
        if self.weight is not None:
            add_loader(self.weight, self.load)

    def load(self, param: Tensor, loaded: Tensor, shard_id: int | str | None = None):
        """
        Load the blocks of this rank, as vLLM's weight loader. Each rank reads the whole tensor.

        :param shard_id: part of a merged layer that the tensor is stored under
        :raises ValueError: if the tensor does not fit, or a second part has one, too
        """
        # a weight reload brings the same part again
        if self._shard_id is not None and shard_id != self._shard_id:
            raise ValueError(
                f"The checkpoint stores the transform tensor {self.name} a second time, under "
                "another Linear of the same merged layer: the checkpoint is damaged"
            )
        self._shard_id = shard_id
        validate_stored_transform(
            self.name, loaded, self.full_shape, self._precision, self._sha256
        )
        # a weight reload may bring another checkpoint, whose config vLLM does not read
        self._sha256 = None
        blocks = loaded.narrow(0, self.first_block, param.shape[0])
        if param.dtype != torch.int8:
            blocks = dequantize_blocks(blocks, param.dtype)
        if not torch.isfinite(blocks).all():
            raise ValueError(
                f"Transform tensor {self.name} holds values beyond the range of {param.dtype}: "
                "set `--dtype bfloat16`"
            )
        param.data.copy_(blocks)

    def check_loaded(self):
        """
        :raises ValueError: if the checkpoint did not hold the tensor
        """
        # on the meta device until its turn in a weight reload, which keeps what is missing
        if self.weight is not None and not self.weight.is_meta:
            validate_transform(self.name, self.weight, self.weight.shape)
