# SPDX-License-Identifier: Apache-2.0
"""Apply planned transforms: write weights, attach online transforms, extend the config."""

from collections.abc import Iterator, Mapping

import torch
from compressed_tensors.utils import (
    align_module_device,
    get_execution_device,
    update_offload_parameter,
)
from torch import Tensor
from torch.nn import Linear, Parameter

from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.checkpoint.transform_module import CATTransform
from cat_modifier.functional.transform import FusedTransform, multiply_heads
from cat_modifier.modifiers.cat.distributed import barrier
from cat_modifier.modifiers.cat.plan import PlannedTransform

__all__ = ["LinearWeights", "apply_transforms"]


class LinearWeights(Mapping[str, Tensor]):
    """
    Weights of Linears, shape (out, d), float64.

    Each access makes a copy on the device that computes.

    :param linears: Linears by full name
    """

    def __init__(self, linears: Mapping[str, Linear]):
        self._linears = linears

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._linears[name], "weight")

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


def apply_transforms(
    transforms: list[PlannedTransform],
    linears: Mapping[str, Linear],
    config: CATTransformConfig,
):
    """
    Write the weights of one Linear after the other, then attach the transforms.

    The peak of memory is one Linear in float64, and the inverse of one transform.

    :param transforms: transforms that were planned together
    :param linears: Linears by full name, value projections included
    :param config: receives the transforms
    """
    values = {}
    for one in transforms:
        if one.source.value_projection is not None:
            values[one.source.value_projection.linear] = one
    for one in transforms:
        fused = one.transform.invert()
        for name in one.source.names:
            _write_weight(linears[name], fused, values.pop(name, None))
    # value projections whose own input has no transform
    for name, value in values.items():
        _write_weight(linears[name], None, value)
    for one in transforms:
        _attach(one, [linears[name] for name in one.source.names], config)


def _write_weight(linear: Linear, own: FusedTransform | None, value: PlannedTransform | None):
    """
    Write the weight of a Linear, and its bias if the rows change.

    :param own: transform of the Linear's input; None for none
    :param value: transform to be fused into the Linear's rows; None for none
    """
    weight = _read(linear, "weight")
    new = {"weight": weight}
    if value is not None:
        assert value.source.value_projection is not None
        blocks = value.transform.blocks[:: value.source.value_projection.repeats]
        new["weight"] = multiply_heads(weight, blocks)
        if linear.bias is not None:
            new["bias"] = multiply_heads(_read(linear, "bias"), blocks)
    if own is not None:
        new["weight"] = own.transform_weight(new["weight"])
    # ranks can share offloaded weights: all ranks read before any writes
    barrier()
    for name, tensor in new.items():
        update_offload_parameter(linear, name, tensor.to(getattr(linear, name).dtype))
    barrier()


def _attach(one: PlannedTransform, linears: list[Linear], config: CATTransformConfig):
    """
    Attach the online part of a transform, and add it to the config.

    :param linears: Linears that read the input; the first holds the transform
    """
    source, layout = one.source, one.layout
    if source.value_projection is not None:
        config.fused |= dict.fromkeys(source.names, source.value_projection.linear)
        if layout.online_hadamard_size == 1 and one.clip_ratio == 1:
            return
    blocks = None if one.is_fused else one.transform.blocks
    precision = None if blocks is None else blocks.dtype
    scheme, args = config.add_input(list(source.names), layout, one.clip_ratio, precision)
    weight = None if blocks is None else Parameter(blocks, requires_grad=False)
    CATTransform(weight, scheme, args).attach(linears)


def _read(linear: Linear, name: str) -> Tensor:
    """Copy a parameter to the device that computes, in float64"""
    device = get_execution_device(linear)
    with align_module_device(linear):
        return getattr(linear, name).detach().to(device, torch.float64)
