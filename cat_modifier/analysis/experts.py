# SPDX-License-Identifier: Apache-2.0
"""
Experts of a mixture, which Transformers holds in one parameter for all of them: they are no
Linears, and would be left out of an analysis without a word.
"""

from collections.abc import Iterable

from compressed_tensors.utils.match import is_match
from torch.nn import Module

__all__ = ["fused_experts", "make_experts_linears"]


def fused_experts(model: Module, ignore: Iterable[str] = ()) -> list[str]:
    """
    :param ignore: names, classes or `re:` patterns of what is not asked for
    :return: names of modules which have a stack of matrices as a parameter, but for those
        of torch itself (convolutions)
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

    :raises ValueError: if there are any and llm-compressor is not installed
    """
    if not fused_experts(model):
        return
    try:
        from llmcompressor.modeling.moe.linearize import linearize_moe
    except ModuleNotFoundError as error:
        raise ValueError(
            "The model has experts which hold their weights in one parameter. To analyze them "
            "install llm-compressor: pip install 'cat-modifier[compress]'"
        ) from error
    linearize_moe(model)
