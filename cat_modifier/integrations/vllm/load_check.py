# SPDX-License-Identifier: Apache-2.0
"""
Checks in vLLM's model loader: it asks no quantization config between the making of the layers
and the loading of their weights.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from json import JSONDecodeError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import Module
from wrapt import wrap_function_wrapper

from cat_modifier.checkpoint.schema import TENSOR_SUFFIX
from cat_modifier.integrations.vllm.compat import BaseModelLoader, LinearBase
from cat_modifier.integrations.vllm.config import CATCompressedTensorsConfig
from cat_modifier.integrations.vllm.lora import note_fused

__all__ = ["add_load_checks"]

_MISFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""What vLLM raises for a config or a tensor that does not fit the model"""

_NO_PLACE = "no module or parameter named"
"""What vLLM says of a tensor whose layer it has, but not so"""


def add_load_checks():
    """
    Let vLLM's loaders refuse, with a reason, a model that has no layer or no place for a
    transform, and a CAT checkpoint with tensors that are missing or do not fit. Other models
    load as before.
    """
    wrap_function_wrapper(BaseModelLoader, "create_model", _create_model)


def _create_model(create: Callable, loader: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    is_cat = isinstance(vllm_config.quant_config, CATCompressedTensorsConfig)
    try:
        model = create(*args, **kwargs)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except _MISFIT as error:
        if not is_cat:
            raise
        raise ValueError(
            f"vLLM cannot make the model of config.json ({type(error).__name__}: {error}): "
            "config.json is damaged, or vLLM does not serve this model here. `cat-modifier "
            "verify FOLDER` tells which"
        ) from error
    if is_cat:
        registry = vllm_config.quant_config.registry
        registry.check_claimed()
        note_fused(model, registry.fused)
        # vLLM's own check for tensors that a checkpoint lacks, by default only without
        # quantization
        if getattr(loader, "enable_weights_track", True) is None:
            loader.enable_weights_track = True
        # random weights are not loaded
        if vllm_config.load_config.load_format != "dummy":
            model.load_weights = partial(_load_weights, model, model.load_weights)
    return model


def _load_weights(
    model: Module, load: Callable, weights: Iterable[tuple[str, Tensor]], **options: Any
) -> Any:
    """
    Load weights, with errors that name the tensor.

    :param load: ``model.load_weights`` of vLLM, which loads again in a weight reload
    :raises NotImplementedError: if vLLM has no place for a transform
    :raises ValueError: if a tensor or a file is damaged, if vLLM has no place for a quantized
        weight, or if a bias is missing
    """
    del model.load_weights
    biases = {
        name: module.bias
        for name, module in model.named_modules()
        if isinstance(module, LinearBase) and module.bias is not None
    }
    for bias in biases.values():
        bias.data.fill_(torch.nan)
    name = ""

    def remember() -> Iterator[tuple[str, Tensor]]:
        nonlocal name
        for name_and_tensor in weights:
            name = name_and_tensor[0]
            yield name_and_tensor
        name = "A tensor"  # of a model that reads all before it loads the first

    try:
        loaded = load(remember(), **options)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except (SafetensorError, JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"A file of the checkpoint is damaged or incomplete ({error}): `cat-modifier "
            "verify FOLDER` names it"
        ) from error
    except ValueError as error:
        if _NO_PLACE not in str(error):
            raise
        raise ValueError(
            f"vLLM has no place for {name} in this model ({error}): the checkpoint is damaged, "
            "or a Linear is quantized that vLLM leaves as it is. Name an lm_head in `targets` "
            "of the modifier that quantizes, beside `Linear`. If it was named, vLLM ties it to "
            "the embedding in this model, as in Gemma 2: add it to `ignore` of CATModifier and "
            "of that modifier, and other Linears as well"
        ) from error
    except _MISFIT as error:
        reason = f"{type(error).__name__}: {error}"
        if name.endswith(TENSOR_SUFFIX) and isinstance(error, AttributeError | KeyError):
            raise NotImplementedError(
                f"vLLM has no place for {name} where it loads this model ({reason}): add "
                f"{name.removesuffix(TENSOR_SUFFIX)} to `ignore` of CATModifier"
            ) from error
        raise ValueError(
            f"{name} does not fit the model ({reason}): the checkpoint is damaged, or vLLM "
            "loads this model in another way. `cat-modifier verify FOLDER` tells which"
        ) from error
    for name, bias in biases.items():
        if bias.isnan().any():
            raise ValueError(
                f"{name}: `bias`, or its part of a merged layer, is missing from the "
                "checkpoint, or holds values that are no numbers: it is damaged. Copy or "
                "download it again"
            )
    return loaded
