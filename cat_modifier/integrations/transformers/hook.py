# SPDX-License-Identifier: Apache-2.0
"""
Registers the CAT quantizer when Transformers reads its first compressed-tensors config.

Earlier is too early. The registry is imported in the middle of ``transformers``, whose
models the quantizer needs; and vLLM imports the registry, but never loads a model with it.
"""

from types import ModuleType
from typing import Any

from transformers.utils.quantization_config import CompressedTensorsConfig

__all__ = ["register"]

_METHOD = "compressed-tensors"


def register(registry: ModuleType):
    """
    Put a placeholder into Transformers' table of quantization configs. Runs after the
    import of the module that holds the table.

    :param registry: ``transformers.quantizers.auto``
    """
    configs = registry.AUTO_QUANTIZATION_CONFIG_MAPPING

    class Placeholder(CompressedTensorsConfig):
        @classmethod
        def from_dict(cls, *args, **kwargs) -> Any:
            from cat_modifier.integrations.transformers import quantizer

            quantizer.register()
            return configs[_METHOD].from_dict(*args, **kwargs)

    configs[_METHOD] = Placeholder
