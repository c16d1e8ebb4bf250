# SPDX-License-Identifier: Apache-2.0
"""How modifiers run a model, and what they replace while they do."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.quantization import disable_quantization, enable_quantization
from llmcompressor.core import State
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils.helpers import disable_cache, disable_hf_kernels, eval_context
from torch import Tensor
from torch.nn import Linear, Module

__all__ = ["as_it_is_run", "replace_forward", "run_batch", "unquantized"]


def run_batch(state: State, batch: Any):
    """
    Pass one batch through the model.

    :param batch: keyword arguments of the model
    """
    batch = tensors_to_device(batch, get_execution_device(state.model))
    with as_it_is_run(state.model):
        state.model(**batch)


@contextmanager
def as_it_is_run(model: Module) -> Iterator[None]:
    """
    Context to run a model in without gradients, caches, quantization, and the product of its
    lm_head.
    """
    with unquantized(model), _without_lm_head(model), torch.no_grad():
        yield


@contextmanager
def unquantized(model: Module) -> Iterator[None]:
    """Context to run a model in without caches, dropout and quantization"""
    # may be called inside a context of llm-compressor that has disabled it already
    quantized = [one for one in model.modules() if getattr(one, "quantization_enabled", False)]
    with ExitStack() as stack:
        for context in (disable_cache, eval_context, disable_hf_kernels):
            stack.enter_context(context(model))
        for module in quantized:
            disable_quantization(module)
            stack.callback(enable_quantization, module)
        yield


@contextmanager
def _without_lm_head(model: Module) -> Iterator[None]:
    """Replace logits by zeros that take no memory; hooks still see the inputs"""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, Linear):
        yield
        return

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(1).expand(*x.shape[:-1], head.out_features)

    with replace_forward(head, zeros):
        yield


@contextmanager
def replace_forward(module: Module, forward: Callable) -> Iterator[None]:
    """
    Replace what a module computes within the context.

    `patch_attr` of compressed-tensors would leave the method in the instance, where it hides
    a later one of the class.
    """
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
