# SPDX-License-Identifier: Apache-2.0
"""The inputs of a model whose transforms can be trained, and the checks before training."""

from typing import Any

from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.distributed import is_distributed
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationStrategy,
    QuantizationType,
)
from llmcompressor.core import State, active_session
from llmcompressor.modifiers import Modifier
from torch.nn import Linear, Module

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.checkpoint.schema import TRANSFORM_NAME, CATTransformConfig
from cat_modifier.modifiers.cat.validation import check_quantized
from cat_modifier.modifiers.cat_training.layer import LayerInput

__all__ = ["check_count", "check_inputs", "check_recipe", "find_config", "find_inputs"]


def check_recipe(modifier: Modifier, state: State):
    """
    Check the data and the recipe of a modifier that trains.

    :raises ValueError: if there is no data, no preceding CATModifier, or more than one rank
    """
    name = type(modifier).__name__
    if state.data.calib is None:
        raise ValueError(f"{name} needs calibration data: pass a `dataset` to oneshot")
    before = []
    for one in active_session().lifecycle.recipe.modifiers:
        if one is modifier:
            break
        before.append(type(one).__name__)
    if "CATModifier" not in before:
        raise ValueError(
            f"{name} trains the transforms of a CATModifier: put one before it in the recipe"
        )
    if is_distributed():
        raise ValueError(f"{name} trains in one process: start one rank")


def check_count(batches: int, modifier: Modifier):
    """
    :raises ValueError: if there are too few batches
    """
    if batches < 2:
        raise ValueError(
            f"{type(modifier).__name__} needs at least two batches of calibration data: one to "
            "train on, and one held out to decide when to stop"
        )


def find_config(model: Module, modifier: Modifier) -> CATTransformConfig:
    """
    Find the transforms that a CATModifier has inserted.

    :raises ValueError: if there are none yet
    """
    config = getattr(model, TRANSFORM_CONFIG_NAME, None)
    if not isinstance(config, CATTransformConfig):
        raise ValueError(
            f"{type(modifier).__name__} cannot share a calibration pass with other modifiers. "
            "Use `oneshot(..., pipeline='independent')`, the default"
        )
    return config


def find_inputs(model: Module, config: CATTransformConfig) -> list[LayerInput]:
    """List the inputs of all Linears that have a transform or are quantized"""
    linears = {n: one for n, one in model.named_modules() if isinstance(one, Linear)}

    def value_projection(name: str) -> ValueProjection | None:
        if name not in config.fused:
            return None
        values = config.fused[name]
        attention: Any = model.get_submodule(name.rpartition(".")[0])
        repeats = linears[name].in_features // linears[values].out_features
        return ValueProjection(values, attention.head_dim, repeats)

    inputs = [
        LayerInput(
            {name: linears[name] for name in args.targets},
            getattr(linears[args.targets[0]], TRANSFORM_NAME),
            value_projection(args.targets[0]),
        )
        for _, args in config.inputs()
    ]
    seen = {name for one in inputs for name in one.linears}
    rest = [
        name
        for name, linear in linears.items()
        if name not in seen
        and (name in config.fused or getattr(linear, "quantization_scheme", None) is not None)
    ]
    return inputs + [
        LayerInput({name: linears[name]}, None, value_projection(name)) for name in rest
    ]


def check_inputs(inputs: list[LayerInput], modifier: Modifier):
    """
    Check that Linears are not quantized yet, and that training supports their schemes.

    :raises ValueError: if a Linear is quantized, or its scheme is not supported
    """
    for one in inputs:
        check_quantized(one.linears, modifier)
        for name, linear in one.linears.items():
            _check_scheme(name, linear, type(modifier).__name__)


def _check_scheme(name: str, linear: Linear, modifier: str):
    scheme = getattr(linear, "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        raise ValueError(
            f"No modifier quantizes the weight of {name}, so that training has no goal: put a "
            f"QuantizationModifier or GPTQModifier with the same targets after {modifier}"
        )
    weights, inputs = scheme.weights, scheme.input_activations
    groups = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
    is_suited = weights.strategy in (QuantizationStrategy.CHANNEL, *groups)
    if inputs is not None:
        is_suited &= inputs.strategy in (QuantizationStrategy.TOKEN, *groups)
        is_suited &= inputs.dynamic in (True, DynamicType.LOCAL)
    for args in (weights, inputs):
        is_suited &= args is None or args.type == QuantizationType.INT or args.symmetric
    if not is_suited:
        raise ValueError(
            f"{modifier} does not support the scheme of {name}. Use weights with a scale per "
            "channel or group, and activations with a dynamic scale per token or group, all "
            "of them integers or symmetric floats"
        )
