# SPDX-License-Identifier: Apache-2.0
"""
How a CAT checkpoint is told from others. Imports no library: it still works where the rest
of the package cannot be imported, and has to refuse the checkpoint.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["METHOD_NAME", "has_transform"]

METHOD_NAME = "cat-modifier"
"""Name of the package, and of its quantization method in vLLM"""


def has_transform(quantization_config: Mapping[str, Any] | None) -> bool:
    """
    Whether a checkpoint has CAT transforms.

    :param quantization_config: object of this name in ``config.json``, of any method
    """
    transform_config = (quantization_config or {}).get("transform_config")
    return isinstance(transform_config, dict) and str(
        transform_config.get("requires")
    ).startswith(METHOD_NAME)
