# SPDX-License-Identifier: Apache-2.0
"""Which modules are decoding layers, as llm-compressor sees it"""

from compressed_tensors import match_named_modules
from llmcompressor.utils.pytorch import infer_sequential_targets
from torch.nn import Module

__all__ = ["find_decoding_layers"]


def find_decoding_layers(model: Module) -> dict[str, Module]:
    """By name, in the order of the model"""
    targets = infer_sequential_targets(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    return dict(match_named_modules(model, targets))
