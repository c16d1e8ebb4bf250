# SPDX-License-Identifier: Apache-2.0
"""Decoding layers of a model, as llm-compressor finds them."""

from compressed_tensors import match_named_modules
from llmcompressor.utils.pytorch import infer_sequential_targets
from torch.nn import Module

__all__ = ["find_decoding_layers"]


def find_decoding_layers(model: Module) -> dict[str, Module]:
    """
    Find the decoding layers.

    :return: modules by full name, in the order of the model
    :raises ValueError: if the model does not say which they are
    """
    layers = {}
    if getattr(model, "_no_split_modules", None):
        targets = infer_sequential_targets(model)
        layers = dict(match_named_modules(model, targets))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} does not name its decoding layers: set its "
            "`_no_split_modules` to their classes"
        )
    return layers
