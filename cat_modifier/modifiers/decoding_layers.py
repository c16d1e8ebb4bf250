# SPDX-License-Identifier: Apache-2.0
"""Decoding layers of a model, as llm-compressor finds them."""

from compressed_tensors import match_named_modules
from llmcompressor.utils.pytorch import infer_sequential_targets
from torch.nn import Module

__all__ = ["find_decoding_layers"]


def find_decoding_layers(model: Module) -> dict[str, Module]:
    """
    Find the decoding layers.

    :return: modules by full name, in the order of the model; empty if the model does not name
        their classes
    """
    if not getattr(model, "_no_split_modules", None):
        return {}
    return dict(match_named_modules(model, infer_sequential_targets(model)))
