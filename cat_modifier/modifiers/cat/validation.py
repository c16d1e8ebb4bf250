# SPDX-License-Identifier: Apache-2.0
"""Checks that stop a run early, where the modifiers would produce a wrong model, and what an
earlier run left on it."""

from collections.abc import Mapping

from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.distributed import is_distributed
from compressed_tensors.quantization import (
    QuantizationMetadata,
    QuantizationStatus,
)
from compressed_tensors.transform.factory.base import TransformBase
from compressed_tensors.utils.match import match_name
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from loguru import logger
from torch.nn import Linear, Module

from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.checkpoint.integers import (
    INT8_PRODUCT_RULE,
    is_integer,
    suits_int8_product,
)
from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.modifiers.cat.distributed import gather

__all__ = [
    "check_earlier_quantizers",
    "check_earlier_transforms",
    "check_later_transforms",
    "check_quantized",
    "check_same_inputs",
    "check_shared_pass",
    "clear_schemes_of_failed_run",
    "warn_if_not_quantized",
    "warn_if_not_served",
]


def check_later_transforms(modifier: Modifier):
    """
    Check that no later modifier changes what the modifier has transformed.

    :raises ValueError: if one of llm-compressor's transforms follows the modifier
    """
    later = [
        type(other).__name__
        for other in _neighbours(modifier)[1]
        if any(
            base.__module__.startswith("llmcompressor.modifiers.transform.")
            for base in type(other).__mro__
        )
    ]
    if later:
        raise ValueError(
            f"{', '.join(later)} would change weights or inputs that CATModifier has "
            "transformed: put it before CATModifier in the recipe"
        )


def check_earlier_quantizers(linears: Mapping[str, Linear], modifier: Modifier):
    """
    Check that no earlier modifier quantizes a Linear.

    :raises ValueError: if one does
    """
    if not any(isinstance(other, QuantizationMixin) for other in _neighbours(modifier)[0]):
        return
    for name, linear in linears.items():
        if getattr(linear, "quantization_scheme", None) is not None:
            raise ValueError(
                f"{name} would be quantized before it is transformed: put "
                f"{type(modifier).__name__} before the quantization modifier in the recipe"
            )


def clear_schemes_of_failed_run(model: Module, modifier: Modifier):
    """
    Remove schemes that another recipe attached, and that were not calibrated.

    llm-compressor replaces the schemes of Linears that the recipe quantizes, and keeps others.
    Does nothing if an earlier modifier of the recipe may have attached them, or if no later
    one quantizes.
    """
    earlier, later = _neighbours(modifier)
    if any(isinstance(other, QuantizationMixin) for other in earlier):
        return
    if not any(isinstance(other, QuantizationMixin) for other in later):
        return
    for module in model.modules():
        if getattr(module, "quantization_status", None) == QuantizationStatus.INITIALIZED:
            QuantizationMetadata.clear_quantization(module)
            delattr(module, "quantization_status")


def warn_if_not_quantized(modifier: Modifier):
    """Warn of a recipe that quantizes nothing: a model with transforms alone cannot be saved"""
    modifiers = active_session().lifecycle.recipe.modifiers
    if not any(isinstance(other, QuantizationMixin) for other in modifiers):
        logger.warning(
            f"Nothing in the recipe quantizes, and a model with transforms alone cannot be "
            f"saved: add a QuantizationModifier or a GPTQModifier after "
            f"{type(modifier).__name__}"
        )


def _neighbours(modifier: Modifier) -> tuple[list[Modifier], list[Modifier]]:
    """Return the modifiers before and after a modifier in the recipe"""
    modifiers = active_session().lifecycle.recipe.modifiers
    position = next((i for i, other in enumerate(modifiers) if other is modifier), 0)
    return modifiers[:position], modifiers[position + 1 :]


def check_shared_pass(modifier: Modifier):
    """
    Check that the modifier has the calibration pass to itself.

    :raises ValueError: if other modifiers calibrate in the same pass
    """
    sharing = [
        type(other).__name__
        for other in active_session().lifecycle.recipe.modifiers
        if other is not modifier
    ]
    if sharing:
        raise ValueError(
            f"CATModifier cannot share a calibration pass with {', '.join(sharing)}, "
            "which would be calibrated on inputs that are not transformed yet. Use "
            "`oneshot(..., pipeline='independent')`, the default"
        )


def check_earlier_transforms(
    model: Module, linears: Mapping[str, Linear]
) -> CATTransformConfig:
    """
    Check that earlier transforms of the model and new ones can be combined.

    :return: config to add transforms to: the config of an earlier CATModifier, or an empty
        one
    :raises ValueError: if the input of a Linear has a transform, or online transforms of
        another modifier would be lost
    """
    config = getattr(model, TRANSFORM_CONFIG_NAME, None)
    transformed: set[str] = set()
    if isinstance(config, CATTransformConfig):
        transformed = {name for _, args in config.inputs() for name in args.targets}
        transformed |= config.fused.keys()
    elif config is not None and any(
        args.is_online() for one in config.config_groups.values() for args in one.apply
    ):
        raise ValueError(
            "The model has online transforms of another modifier, which a CAT checkpoint "
            "cannot hold: leave one of the two modifiers out, or the online transforms"
        )
    for name, linear in linears.items():
        if name in transformed or any(
            isinstance(child, TransformBase) for child in linear.children()
        ):
            raise ValueError(
                f"The input of {name} has a transform already, and a second one cannot be "
                "applied: load the model anew if an earlier run has failed or transformed "
                "it, leave one of two modifiers out, or choose other `targets`"
            )
    return config if isinstance(config, CATTransformConfig) else CATTransformConfig.empty()


def check_quantized(linears: Mapping[str, Linear], modifier: Modifier):
    """
    Check that no Linear is quantized yet.

    :raises ValueError: if a Linear is quantized: the modifier comes too late in the recipe
    """
    for name, linear in linears.items():
        status = getattr(linear, "quantization_status", None)
        if status is not None and status > QuantizationStatus.CALIBRATION:
            raise ValueError(
                f"{name} is quantized already: put {type(modifier).__name__} before the "
                "quantization modifier in the recipe, or load the model anew if an earlier "
                "run has quantized it"
            )


def check_same_inputs(inputs: list[SharedInput]):
    """
    Compare the shared inputs of all ranks. A collective call.

    :raises ValueError: if the ranks saw different Linears share an input
    """
    if not is_distributed():
        return
    names = [list(one.linears) for one in inputs]
    if any(other != names for other in gather(names)):
        raise ValueError(
            "The ranks saw different Linears share an input, so that their second moments "
            "cannot be summed: give every rank data for all Linears, or set `mappings`"
        )


def warn_if_not_served(model: Module, linears: Mapping[str, Linear]):
    """
    Warn of what vLLM cannot serve: an lm_head that is transformed or quantized, but not by
    its name, gpt-oss, and the first Linear whose integers it may have no kernel for.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    names = [name for name, one in model.named_modules() if one is head]
    scheme = getattr(head, "quantization_scheme", None)
    for name in names[:1]:
        is_named = scheme is not None and any(match_name(name, x) for x in scheme.targets)
        if (head in linears.values() or scheme is not None) and not is_named:
            logger.warning(
                f"vLLM serves a quantized or transformed {name} only if `targets` of the "
                "modifier that quantizes name it, beside `Linear`: name it there, or add it to "
                "`ignore` of all modifiers, as for Whisper, where vLLM ties it to the embedding"
            )
    if getattr(getattr(model, "config", None), "model_type", "") == "gpt_oss":
        logger.warning(
            "vLLM cannot serve gpt-oss from this checkpoint: it reads experts with biases only "
            "as the original model stores them. The checkpoint will load in Transformers"
        )
    for name, linear in linears.items():
        scheme = getattr(linear, "quantization_scheme", None)
        if scheme is None or suits_int8_product(scheme.weights, scheme.input_activations):
            continue
        args = scheme.weights, scheme.input_activations
        if is_integer(*args) and min(one.num_bits for one in args) < 8:
            logger.warning(
                f"{name} and others will load in Transformers, but vLLM may not serve "
                f"them: {INT8_PRODUCT_RULE}"
            )
            return
