# SPDX-License-Identifier: Apache-2.0
"""The model of an analysis: its Linears and experts, and passes of data through it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors import match_named_modules
from compressed_tensors.utils import get_execution_device
from compressed_tensors.utils.match import is_match
from torch import Tensor
from torch.nn import Linear, Module

__all__ = ["call", "find_linears", "fused_experts", "make_experts_linears"]
__all__ += ["Batch", "without_predictions"]

Batch = Tensor | Mapping[str, Any]
"""Token ids (or any first argument of the model), or keyword arguments of the model"""


def find_linears(model: Module, targets: list[str], ignore: list[str]) -> dict[str, Linear]:
    """
    :return: Linears by full name, in the order of the model
    :raises ValueError: if there are none, or experts are not Linears
    """
    if fused := fused_experts(model, ignore):
        raise ValueError(
            f"{fused[0]} (one of {len(fused)}) holds all experts in one parameter, not in "
            "Linears: call `llmcompressor.modeling.moe.linearize.linearize_moe(model)` first, "
            "or add it to `ignore`"
        )
    matches = match_named_modules(model, targets, ignore)
    linears = {name: module for name, module in matches if isinstance(module, Linear)}
    if not linears:
        raise ValueError(
            f"The model has no torch.nn.Linear for targets {targets} and ignore {ignore}: "
            "check the names with `model.named_modules()`"
        )
    return linears


def fused_experts(model: Module, ignore: list[str] = ()) -> list[str]:
    """
    Find experts that hold their weights in one parameter, as Transformers makes them.

    :param ignore: names, classes or `re:` patterns of modules to leave out
    :return: names of modules with a stack of matrices as a parameter, without those of torch
        itself (convolutions)
    """
    return [
        name
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        and not any(is_match(name, module, pattern) for pattern in ignore)
    ]


def make_experts_linears(model: Module):
    """
    Replace fused experts by Linears, as llm-compressor does before it quantizes a model.

    :raises ValueError: if there are fused experts and llm-compressor is not installed
    """
    if not fused_experts(model):
        return
    try:
        from llmcompressor.modeling.moe.linearize import linearize_moe
    except ModuleNotFoundError as error:
        raise ValueError(
            "The model has experts that hold their weights in one parameter. To analyze them "
            "install llm-compressor: pip install 'cat-modifier[compress]'"
        ) from error
    linearize_moe(model)


def call(model: Module, batch: Batch, hooks: Mapping[Module, Callable]) -> Any:
    """
    :param batch: arguments of the model, which may be on another device
    :param hooks: forward hooks of modules, for this call
    """
    device = get_execution_device(model)
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        if torch.is_tensor(batch):
            return model(batch.to(device))
        tensors = {k: v.to(device) for k, v in batch.items() if torch.is_tensor(v)}
        return model(**batch | tensors)
    finally:
        for handle in handles:
            handle.remove()


def without_predictions(model: Module, ids: Tensor) -> Batch:
    """Make a batch that asks a causal language model for no logits, if it can do without"""
    batch = {"input_ids": ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    return batch
