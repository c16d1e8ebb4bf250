# SPDX-License-Identifier: Apache-2.0
"""Entry point of the plugin, in vLLM's group ``vllm.general_plugins``."""

import sys
from functools import cache
from typing import Any

from loguru import logger

from cat_modifier.checkpoint.marker import METHOD_NAME, has_transform
from cat_modifier.version import __version__

__all__ = ["register"]


@cache  # vLLM may call it more than once in a process
def register():
    """
    Let vLLM serve CAT checkpoints. vLLM calls this in each of its processes.

    vLLM does not guard the call: if this package does not fit the release of vLLM, other
    models must still serve. A CAT checkpoint is then refused with the reason.
    """
    try:
        from cat_modifier.integrations.vllm.compat import register_quantization_config
        from cat_modifier.integrations.vllm.config import CATCompressedTensorsConfig
        from cat_modifier.integrations.vllm.load_check import add_load_checks
        from cat_modifier.integrations.vllm.lora import add_lora_check

        add_load_checks()
        add_lora_check()
        register_quantization_config(METHOD_NAME)(CATCompressedTensorsConfig)
    except Exception as error:  # whatever the import of a moved name raises
        vllm = getattr(sys.modules.get("vllm"), "__version__", "of unknown version")
        reason = (
            f"cat-modifier {__version__} does not work with vLLM {vllm} and cannot serve CAT "
            f"checkpoints here ({type(error).__name__}: {error}): install a release of one "
            "that fits the other"
        )
        logger.warning(reason)
        _register_refusal(reason)


def _register_refusal(reason: str):
    """
    Refuse CAT checkpoints with a reason, if vLLM's own registry still works. Else vLLM's error
    names this package: see :mod:`cat_modifier.checkpoint.schema`.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

        class Refusal(QuantizationConfig):
            """Claims CAT checkpoints, then refuses them"""

            @classmethod
            def override_quantization_method(
                cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
            ) -> str | None:
                is_cat = user_quant == METHOD_NAME or has_transform(hf_quant_cfg)
                return METHOD_NAME if is_cat else None

            @classmethod
            def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
                raise RuntimeError(reason)

        register_quantization_config(METHOD_NAME)(Refusal)
    except Exception as error:
        logger.warning(f"cat-modifier could not register with vLLM at all: {error}")
