# SPDX-License-Identifier: Apache-2.0
"""
Experts of a mixture that hold their weights in one parameter, as Transformers makes them.

They are no Linears: whatever looks for Linears would leave them out without a word.
"""

from collections.abc import Iterable

from compressed_tensors.utils.match import is_match
from torch.nn import Module
from transformers import PreTrainedModel

__all__ = ["find_fused_experts", "make_experts_linears"]


def find_fused_experts(model: Module, ignore: Iterable[str] = ()) -> list[str]:
    """
    Find experts that hold their weights in one parameter.

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


def make_experts_linears(model: PreTrainedModel):
    """
    Replace fused experts by Linears, as llm-compressor does before it quantizes a model.

    :raises ValueError: if there are fused experts and llm-compressor is not installed
    """
    if not find_fused_experts(model):
        return
    try:
        from llmcompressor.modeling.moe.linearize import linearize_moe
    except ModuleNotFoundError as error:
        raise ValueError(
            "The model has experts that hold their weights in one parameter. To make Linears "
            "of them install llm-compressor: pip install 'cat-modifier[compress]'"
        ) from error
    linearize_moe(model)
