# SPDX-License-Identifier: Apache-2.0
"""
Concentration-Alignment Transforms (CAT, arXiv 2603.04359) for low-bit quantization with
llm-compressor, Transformers and vLLM.

Import the package to use CATModifier in recipes and to load CAT checkpoints with
Transformers. vLLM finds the package by itself.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from cat_modifier.version import __version__

if TYPE_CHECKING:
    from cat_modifier.modifiers.cat.base import CATModifier
    from cat_modifier.modifiers.cat_distillation.base import CATDistillationModifier
    from cat_modifier.modifiers.cat_training.base import CATTrainingModifier

__all__ = [
    "CATDistillationModifier",
    "CATModifier",
    "CATTrainingModifier",
    "__version__",
    "recipe",
]

MODIFIERS = {
    "CATModifier": "cat_modifier.modifiers.cat.base",
    "CATDistillationModifier": "cat_modifier.modifiers.cat_distillation.base",
    "CATTrainingModifier": "cat_modifier.modifiers.cat_training.base",
}
"""Modules of the classes that need llm-compressor"""

# vLLM's processes and the command line import this package too, and need neither library:
# register with each of them once it is imported, or now if it is already
register_post_import_hook("cat_modifier.modifiers.hook:register", "llmcompressor")
register_post_import_hook(
    "cat_modifier.integrations.transformers.hook:register", "transformers.quantizers.auto"
)


def __getattr__(name: str) -> Any:
    if name not in MODIFIERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("llmcompressor") is None:
        raise ImportError(f"{name} needs llm-compressor: pip install 'cat-modifier[compress]'")
    return getattr(import_module(MODIFIERS[name]), name)


def __dir__() -> list[str]:
    names = globals().keys() | set(__all__)
    return sorted(names if find_spec("llmcompressor") else names - MODIFIERS.keys())


def recipe(name: str) -> str:
    """
    Find a recipe of this package.

    :param name: file name in ``recipes/`` without ``.yaml``: ``w4a4``
    :return: path of the YAML file, for ``llmcompressor.oneshot(recipe=...)``
    :raises ValueError: if there is no such recipe
    """
    package = Path(__file__).parent
    # the wheel holds the recipes inside the package, a clone beside it
    folder = (
        package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    )
    recipes = {path.stem: str(path) for path in sorted(folder.glob("*.yaml"))}
    if name not in recipes:
        raise ValueError(f"There is no recipe {name!r}: choose one of {', '.join(recipes)}")
    return recipes[name]
