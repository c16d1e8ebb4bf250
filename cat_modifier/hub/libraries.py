# SPDX-License-Identifier: Apache-2.0
"""Versions of the libraries that results depend on."""

from importlib.metadata import PackageNotFoundError, version

from cat_modifier.version import __version__

__all__ = ["library_versions"]

_LIBRARIES = (
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
    "lm-eval",
    "vllm",
)


def library_versions() -> dict[str, str]:
    """
    :return: version of this package, and of those that are installed, by name
    """
    found = {"cat-modifier": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
