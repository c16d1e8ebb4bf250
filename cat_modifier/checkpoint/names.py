# SPDX-License-Identifier: Apache-2.0
"""Names of modules and tensors."""

__all__ = ["layer_of"]


def layer_of(name: str) -> str:
    """
    Cut a name after its first number: the name of its decoding layer.

    :param name: full name of a module or a tensor
    :return: empty if there is no number
    """
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if index is None else ".".join(parts[: index + 1])
