# SPDX-License-Identifier: Apache-2.0
"""
Models of random weights that take little memory, to observe how a model works.

All weights of one input size are views of the same random numbers. A model of any size can
therefore run a few tokens: what is observed of it depends on shapes and code, not on weights.
"""

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import Tensor
from torch.nn import Embedding, Module, Parameter
from transformers import PreTrainedConfig, PreTrainedModel

from cat_modifier.auto_model import auto_class

__all__ = ["fill", "make_empty"]

_LARGEST_STEP = 61
"""Distance of the rows of an embedding, whose rows overlap"""


def make_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """
    Make a model without weights, as oneshot has it: experts are Linears.

    :return: model with parameters on the meta device, in the dtype of the checkpoint
    """
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=dtype)
        for name, module in get_non_linearized_moes(model):
            # as linearize_moe does it, without weights to copy
            fused: Any = type(module)
            experts = LinearExperts2D.get_linear_experts_cls(fused)
            made = experts(getattr(module, "config", model.config))
            model.set_submodule(name, made.to(dtype))
    model.tie_weights()  # the context makes a parameter of its own for each module
    return model.eval()


def fill(model: PreTrainedModel):
    """
    Fill an empty model with random numbers, float32.

    :param model: result of :func:`make_empty`
    """
    overlapping = {id(module.weight) for module in model.modules() if _is_table(model, module)}
    flat: dict[int, Tensor] = {}
    sizes: dict[int, int] = {}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in overlapping:
            fan_in = _fan_in(parameter)
            sizes[fan_in] = max(sizes.get(fan_in, 0), parameter.numel())
    generator = torch.Generator().manual_seed(0)
    for fan_in, size in sizes.items():
        flat[fan_in] = torch.randn(size, generator=generator).div_(math.sqrt(fan_in))

    filled: dict[int, Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (key := id(parameter)) not in filled:
                if key in overlapping:
                    numbers = _overlapping_rows(parameter, generator)
                elif parameter.ndim > 1:
                    numbers = flat[_fan_in(parameter)][: parameter.numel()]
                    numbers = numbers.view(parameter.shape)
                else:
                    numbers = torch.rand(parameter.shape, generator=generator) + 0.5
                filled[key] = Parameter(numbers, requires_grad=False)
            module._parameters[name] = filled[key]
    model.float()  # buffers


def _is_table(model: PreTrainedModel, module: Module) -> bool:
    """Whether a module reads rows alone, or is the lm_head, which is not multiplied"""
    return isinstance(module, Embedding) or module is model.get_output_embeddings()


def _fan_in(parameter: Tensor) -> int:
    return math.prod(parameter.shape[1:]) if parameter.ndim == 2 else parameter.shape[-1]


def _overlapping_rows(table: Tensor, generator: torch.Generator) -> Tensor:
    rows, columns = table.shape
    step = min(_LARGEST_STEP, columns)
    numbers = torch.randn(step * (rows - 1) + columns, generator=generator)
    return numbers.as_strided((rows, columns), (step, 1))
