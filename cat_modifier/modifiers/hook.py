# SPDX-License-Identifier: Apache-2.0
"""
Registers the modifiers with llm-compressor. They are imported when a recipe names one.

They cannot be imported here: they import llm-compressor, which is not fully initialized at
this moment.
"""

from importlib.metadata import version
from types import ModuleType
from typing import Any

from llmcompressor.modifiers import Modifier, ModifierFactory
from loguru import logger

import cat_modifier

__all__ = ["register"]


def register(llmcompressor: ModuleType):
    """Let recipes in YAML name the modifiers. Runs after ``import llmcompressor``."""
    try:
        for name in cat_modifier.MODIFIERS:
            ModifierFactory.register(name, _make_placeholder(name))
    except Exception as error:  # inside an import, which must not fail because of this package
        logger.warning(
            f"cat-modifier {cat_modifier.__version__} does not work with llm-compressor "
            f"{version('llmcompressor')} and cannot register its modifiers "
            f"({type(error).__name__}: {error}): install a release of one that fits the other"
        )


def _make_placeholder(name: str) -> type[Modifier]:
    """Make a class that creates instances of the modifier instead of its own."""

    class Placeholder(Modifier):
        def __new__(cls, **options) -> Any:
            return getattr(cat_modifier, name)(**options)

    return Placeholder
