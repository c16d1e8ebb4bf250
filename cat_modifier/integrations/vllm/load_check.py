# SPDX-License-Identifier: Apache-2.0
"""
Checks in vLLM's model loader: it asks no quantization config between the making of the layers
and the loading of their weights.
"""

from collections.abc import Callable
from typing import Any

from wrapt import wrap_function_wrapper

from cat_modifier.checkpoint.schema import TRANSFORM_NAME
from cat_modifier.integrations.vllm.compat import BaseModelLoader
from cat_modifier.integrations.vllm.config import CATCompressedTensorsConfig

__all__ = ["add_load_checks"]


def add_load_checks():
    """
    Let vLLM's loaders refuse, with a reason, a model that has no layer or no place for a
    transform. Other models load as before.
    """
    wrap_function_wrapper(BaseModelLoader, "create_model", _create_model)
    wrap_function_wrapper(BaseModelLoader, "load_model", _load_model)


def _create_model(create: Callable, loader: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    model = create(*args, **kwargs)
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    if isinstance(vllm_config.quant_config, CATCompressedTensorsConfig):
        vllm_config.quant_config.registry.check_claimed()
    return model


def _load_model(load: Callable, loader: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    try:
        return load(*args, **kwargs)
    except (AttributeError, KeyError) as error:
        if TRANSFORM_NAME not in str(error):
            raise
        raise NotImplementedError(
            f"vLLM has no place for an input transform where it loads this model ({error}): "
            "add the Linears of that name to `ignore` of CATModifier"
        ) from error
