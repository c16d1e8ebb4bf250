# SPDX-License-Identifier: Apache-2.0
"""
Fused experts: all experts of a mixture hold their weights in one parameter, as Transformers
makes them.

They are not Linears, so that code that looks for Linears would skip them silently.
"""

from collections.abc import Iterable

from compressed_tensors.utils.match import is_match
from torch.nn import Module
from transformers import PreTrainedModel

__all__ = ["find_fused_experts", "make_experts_linears"]


def find_fused_experts(model: Module, ignore: Iterable[str] = ()) -> list[str]:
    """
    Find fused experts: modules with a parameter of three dimensions.

    Modules of torch itself (convolutions) do not count.

    :param ignore: names, classes or `re:` patterns of modules to leave out
    :return: full names
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
            "The model has experts that hold their weights in one parameter. Install "
            "llm-compressor to replace them by Linears: pip install 'cat-modifier[compress]'"
        ) from error
    linearize_moe(model)
