# SPDX-License-Identifier: Apache-2.0
"""Recipes, models and data with which our modifiers would do harm, or of which they warn"""

from collections.abc import Mapping

from compressed_tensors.distributed import is_distributed
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.transform.factory.base import TransformBase
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from loguru import logger
from torch.nn import Linear

from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.checkpoint.integers import (
    INT8_PRODUCT_RULE,
    is_integer,
    suits_int8_product,
)
from cat_modifier.modifiers.cat.distributed import of_all_ranks

__all__ = [
    "check_different_groups",
    "check_later_transforms",
    "check_quantized",
    "check_shared_pass",
    "check_transformed",
    "warn_of_what_cannot_be_served",
]


def check_later_transforms(modifier: Modifier):
    """
    :raises ValueError: if one of llm-compressor's transforms follows the modifier
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    position = next((i for i, other in enumerate(modifiers) if other is modifier), 0)
    later = [
        type(other).__name__
        for other in modifiers[position + 1 :]
        if any(
            base.__module__.startswith("llmcompressor.modifiers.transform.")
            for base in type(other).__mro__
        )
    ]
    if later:
        raise ValueError(
            f"{', '.join(later)} would change inputs or weights between which CATModifier "
            "has put a transform: put it before CATModifier in the recipe"
        )


def check_shared_pass(modifier: Modifier):
    """
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


def check_transformed(linears: Mapping[str, Linear]):
    """
    :raises ValueError: if the input of a Linear has a transform
    """
    for name, linear in linears.items():
        if any(isinstance(child, TransformBase) for child in linear.children()):
            raise ValueError(
                f"The input of {name} has an online transform already, and a second one "
                "cannot be applied: leave one of the two modifiers out"
            )


def check_quantized(linears: Mapping[str, Linear], modifier: Modifier):
    """
    :raises ValueError: if a Linear is quantized, so that the modifier comes too late
    """
    for name, linear in linears.items():
        status = getattr(linear, "quantization_status", None)
        if status is not None and status > QuantizationStatus.CALIBRATION:
            raise ValueError(
                f"{name} is quantized already: put {type(modifier).__name__} before the "
                "quantization modifier in the recipe"
            )


def check_different_groups(groups: list[SharedInput]):
    """
    A collective call

    :raises ValueError: if the ranks saw different Linears read the same input
    """
    if not is_distributed():
        return
    names = [list(group.linears) for group in groups]
    if any(other != names for other in of_all_ranks(names)):
        raise ValueError(
            "The ranks observed different groups of Linears, so that their moments "
            "cannot be summed: give every rank data for all Linears, or set `mappings`"
        )


def warn_of_what_cannot_be_served(linears: Mapping[str, Linear]):
    """Once, by the first Linear of which vLLM may have no kernel for the integers"""
    for name, linear in linears.items():
        scheme = getattr(linear, "quantization_scheme", None)
        args = getattr(scheme, "weights", None), getattr(scheme, "input_activations", None)
        if (
            is_integer(*args)
            and min(quantization.num_bits for quantization in args) < 8
            and not suits_int8_product(*args)
        ):
            logger.warning(
                f"{name} and others will load in Transformers, but vLLM may not serve "
                f"them: {INT8_PRODUCT_RULE}"
            )
            return
