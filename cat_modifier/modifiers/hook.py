# SPDX-License-Identifier: Apache-2.0
"""
Registers the modifiers with llm-compressor, to be imported when a recipe names one.

Earlier is too early: modules of this package import llm-compressor, and a modifier that
is imported at that moment would find them half initialized.
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
