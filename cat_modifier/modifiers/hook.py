# SPDX-License-Identifier: Apache-2.0
"""
Registers the modifiers with llm-compressor. They are imported when a recipe names one.

They cannot be imported here: they import llm-compressor, which is not fully initialized at
this moment.
"""

from types import ModuleType
from typing import Any

from llmcompressor.modifiers import Modifier, ModifierFactory

import cat_modifier

__all__ = ["register"]


def register(llmcompressor: ModuleType):
    """Let recipes in YAML name the modifiers. Runs after ``import llmcompressor``."""
    for name in cat_modifier.MODIFIERS:
        ModifierFactory.register(name, _make_placeholder(name))


def _make_placeholder(name: str) -> type[Modifier]:
    """Make a class that creates instances of the modifier instead of its own."""

    class Placeholder(Modifier):
        def __new__(cls, **options) -> Any:
            return getattr(cat_modifier, name)(**options)

    return Placeholder
