# SPDX-License-Identifier: Apache-2.0
"""Entry point of the plugin, in vLLM's group ``vllm.general_plugins``"""

__all__ = ["register"]


def register():
    """
    Let vLLM serve CAT checkpoints. vLLM calls this in each of its processes, possibly more
    than once.
    """
    from cat_modifier.integrations.vllm.config import METHOD_NAME, CATCompressedTensorsConfig
    from cat_modifier.integrations.vllm.compat import register_quantization_config

    register_quantization_config(METHOD_NAME)(CATCompressedTensorsConfig)
