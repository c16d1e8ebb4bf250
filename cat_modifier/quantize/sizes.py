# SPDX-License-Identifier: Apache-2.0
"""Bytes of a checkpoint, before it is made."""

from collections.abc import Mapping

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import (
    initialize_module_for_quantization,
)
from torch import Tensor
from torch.nn import Linear

__all__ = ["quantized_linear", "stored_bytes"]

_HEADER = 75
"""Bytes of a tensor in the header of a safetensors file, beside its name"""


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """
    Count the bytes of tensors in a file, its header included.

    Tensors that are one object count once.

    :param tensors: tensors by name, of any device
    """
    unique = {id(tensor): (name, tensor) for name, tensor in tensors.items()}
    return sum(
        tensor.numel() * tensor.element_size() + len(name) + _HEADER
        for name, tensor in unique.values()
    )


def quantized_linear(
    linear: Linear, dtype: torch.dtype, scheme: QuantizationScheme
) -> dict[str, Tensor]:
    """
    Make the tensors that compressed-tensors stores of a Linear, on the meta device.

    :param linear: Linear of the same shape
    :param dtype: dtype of the Linear in the checkpoint
    """
    empty = Linear(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        device="meta",
        dtype=dtype,
    )
    scheme = scheme.model_copy(deep=True)
    initialize_module_for_quantization(empty, scheme)
    compress_module(empty)
    return empty.state_dict()
