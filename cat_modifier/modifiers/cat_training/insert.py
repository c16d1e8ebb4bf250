# SPDX-License-Identifier: Apache-2.0
"""Writes corrected transforms and weights into a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from compressed_tensors.utils import (
    delete_offload_parameter,
    register_offload_parameter,
    update_offload_parameter,
)
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.checkpoint.transform_module import CATTransform
from cat_modifier.functional.stored import dequantize_blocks
from cat_modifier.modifiers.cat_training.layer import TrainableLayer

__all__ = ["insert", "store_in_floats", "without_gradients"]


def store_in_floats(model: Module, config: CATTransformConfig):
    """
    Store transforms in bfloat16 instead of int8, which would round away a part of what is
    trained. They stay what they are: bfloat16 holds int8 exactly.
    """
    for name, scheme in list(config.config_groups.items()):
        if scheme.precision == torch.int8:
            scheme.precision = torch.bfloat16
            renamed = name.replace("int8", "bfloat16")
            if renamed not in config.config_groups:
                config.config_groups[renamed] = config.config_groups.pop(name)
    for module in model.modules():
        if isinstance(module, CATTransform) and module.weight is not None:
            blocks = module.weight.detach()
            if blocks.dtype == torch.int8:
                blocks = dequantize_blocks(blocks, torch.bfloat16)
                delete_offload_parameter(module, "weight")
                register_offload_parameter(module, "weight", Parameter(blocks, False))


def insert(trainable: TrainableLayer, corrections: Mapping[str, Tensor]) -> TrainableLayer:
    """
    Write the corrected transforms and weights into the modules, once all are computed.

    :return: the corrected layer
    """
    corrections = dict(corrections)
    new: list[tuple[Module, str, Tensor]] = []
    for one in trainable.inputs:
        if one.first not in corrections:
            continue
        correction = corrections[one.first].double()
        if one.value_projection is None:
            assert one.transform is not None and one.transform.weight is not None
            # recompute R from T as rounded: the product with the weights stays exact
            before = one.transform.weight.detach().double()
            after = (correction @ before).to(one.transform.weight.dtype)
            correction = torch.linalg.solve(before, after.double(), left=False)
            new.append((one.transform, "weight", after))
        corrections[one.first] = correction
    tensors = trainable.correct(corrections)
    for one in trainable.inputs:
        for name, linear in one.linears.items():
            new.append((linear, "weight", tensors.weights[name].to(linear.weight.dtype)))
            if name in tensors.biases:
                new.append((linear, "bias", tensors.biases[name].to(linear.bias.dtype)))
    for module, key, value in new:
        update_offload_parameter(module, key, value)
    return TrainableLayer(trainable.layer, trainable.name, trainable.inputs)


@contextmanager
def without_gradients(module: Module) -> Iterator[None]:
    """Freeze the parameters of a module, such as norms, within the context"""
    parameters = [one for one in module.parameters() if one.requires_grad]
    for one in parameters:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in parameters:
            one.requires_grad_(True)
