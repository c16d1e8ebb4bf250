# SPDX-License-Identifier: Apache-2.0
"""
Registers the CAT quantizer when Transformers reads its first compressed-tensors config.

Earlier is too early. The registry is imported in the middle of ``transformers``, whose
models the quantizer needs; and vLLM imports the registry, but never loads a model with it.
"""

from types import ModuleType
from typing import Any

from loguru import logger
from transformers import __version__ as transformers_version
from transformers.utils.quantization_config import CompressedTensorsConfig

from cat_modifier.checkpoint.marker import has_transform
from cat_modifier.version import __version__

__all__ = ["register"]

_METHOD = "compressed-tensors"


def register(registry: ModuleType):
    """
    Put a placeholder into Transformers' table of quantization configs. Runs after the
    import of the module that holds the table.

    :param registry: ``transformers.quantizers.auto``
    """
    # runs inside an import of Transformers, which must not fail because of this package
    configs: Any = getattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING", {})
    if _METHOD not in configs:
        logger.warning(_reason("its table of quantization configs has another name"))
        return

    class Placeholder(CompressedTensorsConfig):
        @classmethod
        def from_dict(cls, config_dict, *args, **kwargs) -> Any:
            try:
                from cat_modifier.integrations.transformers import quantizer

                quantizer.register()
            except Exception as error:  # whatever the import of a moved name raises
                reason = _reason(f"{type(error).__name__}: {error}")
                if has_transform(config_dict):
                    raise RuntimeError(reason) from error
                logger.warning(reason)
                return CompressedTensorsConfig.from_dict(config_dict, *args, **kwargs)
            return configs[_METHOD].from_dict(config_dict, *args, **kwargs)

    configs[_METHOD] = Placeholder


def _reason(what: str) -> str:
    return (
        f"cat-modifier {__version__} does not work with Transformers {transformers_version} "
        f"and cannot load CAT checkpoints here ({what}): install a release of one that fits "
        "the other"
    )
