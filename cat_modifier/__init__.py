# SPDX-License-Identifier: Apache-2.0
"""
Concentration-Alignment Transforms (CAT, arXiv 2603.04359) for low-bit quantization with
llm-compressor, Transformers and vLLM.

Importing the package lets Transformers load CAT checkpoints, and lets llm-compressor, if
it is installed, find ``CATModifier`` in recipes. vLLM finds the package by itself.
"""

from importlib.util import find_spec

from cat_modifier.integrations.transformers.quantizer import register as _register_transformers
from cat_modifier.version import __version__

__all__ = ["CATModifier", "CATTrainingModifier", "__version__"]

_register_transformers()

if find_spec("llmcompressor") is not None:
    from llmcompressor.modifiers.factory import ModifierFactory

    from cat_modifier.modifiers.cat.base import CATModifier
    from cat_modifier.modifiers.cat_training.base import CATTrainingModifier

    for _modifier in (CATModifier, CATTrainingModifier):
        ModifierFactory.register(_modifier.__name__, _modifier)


def __getattr__(name: str):
    if name in ("CATModifier", "CATTrainingModifier"):
        raise ImportError(f"{name} needs llm-compressor: pip install 'cat-modifier[compress]'")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
