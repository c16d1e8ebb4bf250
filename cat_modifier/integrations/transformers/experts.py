# SPDX-License-Identifier: Apache-2.0
"""
Experts of a mixture as Linears, as llm-compressor makes them before it quantizes a model.

Transformers holds the experts of a layer in one parameter for each projection. A CAT
checkpoint holds a matrix, its scales and its transform for each expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel

__all__ = ["LinearExperts", "linearize_experts"]

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""Attributes of experts that Transformers' `use_experts_implementation` prepared"""


class Expert(Module):
    """
    Projections of one expert.

    :param sizes: input and output features of each projection by its name
    :param has_bias: whether projections have biases
    """

    def __init__(self, sizes: dict[str, tuple[int, int]], has_bias: bool):
        super().__init__()
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, Linear(inputs, outputs, bias=has_bias))


class LinearExperts(Module):
    """
    Experts of one layer, each with Linears of its own, in submodules "0", "1", ...

    Activation and gate are those of the fused experts.

    :param experts: fused experts, which may be on the meta device
    """

    has_gate: bool
    is_transposed: bool
    is_concatenated: bool
    act_fn: Callable[[Tensor], Tensor]

    def __init__(self, experts: Any):
        super().__init__()
        # what the gate reads: limits, the activation
        for name, value in vars(experts).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        for name, child in experts.named_children():
            self.add_module(name, child)
        self._gate: Callable[[Module, Tensor], Tensor] = type(experts)._apply_gate
        sizes = _projection_sizes(experts)
        self.count = len(experts.down_proj)
        for index in range(self.count):
            self.add_module(str(index), Expert(sizes, experts.has_bias))

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """
        Add up what the experts of each token compute.

        :param hidden_states: shape (tokens, hidden size)
        :param top_k_index: experts of each token, shape (tokens, k)
        :param top_k_weights: shape (tokens, k)
        :return: shape and dtype of hidden_states
        """
        output = torch.zeros_like(hidden_states)
        for index in range(self.count):
            tokens, ranks = torch.where(top_k_index == index)
            if len(tokens):
                values = self._apply_expert(index, hidden_states[tokens])
                values = values * top_k_weights[tokens, ranks, None]
                output.index_add_(0, tokens, values.to(output.dtype))
        return output

    def _apply_expert(self, index: int, hidden_states: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(index))
        up = expert.up_proj(hidden_states)
        if not self.has_gate:
            return expert.down_proj(self.act_fn(up))
        halves = (expert.gate_proj(hidden_states), up)
        # the gate knows the order of channels in the fused parameter
        fused = (
            torch.cat(halves, dim=-1)
            if self.is_concatenated
            else torch.stack(halves, dim=-1).flatten(-2)
        )
        return expert.down_proj(self._gate(self, fused))


def linearize_experts(model: PreTrainedModel) -> list[str]:
    """
    Replace fused experts by :class:`LinearExperts`, before the weights are loaded.

    :return: names of the parameters that were replaced
    :raises NotImplementedError: if experts have parameters of an unknown meaning
    """
    fused = {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in _LAYOUT)
    }
    for name, experts in fused.items():
        _check_parameters(name, experts)
        model.set_submodule(name, LinearExperts(experts))
    return [
        f"{name}.{parameter}"
        for name, experts in fused.items()
        for parameter, _ in experts.named_parameters(recurse=False)
    ]


def _projection_sizes(experts: Any) -> dict[str, tuple[int, int]]:
    """Read input and output features of the projections off the fused parameters"""

    def size(parameter: Tensor) -> tuple[int, int]:
        _, first, second = parameter.shape
        return (first, second) if experts.is_transposed else (second, first)

    down = size(experts.down_proj)
    if not experts.has_gate:
        return {"up_proj": size(experts.up_proj), "down_proj": down}
    inputs, outputs = size(experts.gate_up_proj)
    half = (inputs, outputs // 2)
    return {"gate_proj": half, "up_proj": half, "down_proj": down}


def _check_parameters(name: str, experts: Any):
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    needed = {up, "down_proj"}
    if experts.has_bias:
        needed |= {f"{parameter}_bias" for parameter in needed}
    found = {parameter for parameter, _ in experts.named_parameters(recurse=False)}
    if found != needed:
        raise NotImplementedError(
            f"The experts in {name} cannot be loaded: {type(experts).__name__} has "
            f"parameters {sorted(found)}, not {sorted(needed)}. Add the experts to `ignore` "
            "of all modifiers when you compress the model"
        )
