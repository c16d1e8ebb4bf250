# SPDX-License-Identifier: Apache-2.0
"""From observed inputs to the arguments of :func:`plan_transforms`."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from compressed_tensors.utils import get_execution_device

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.calibration.collector import InputStatistics
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.checkpoint.integers import suits_clipping
from cat_modifier.functional.layout import TransformLayout
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan

__all__ = ["PlanningUnit", "describe_input", "planning_units"]


@dataclass(frozen=True)
class PlanningUnit:
    """
    Inputs that are planned together, because their transforms depend on each other.

    :param inputs: inputs in the order of the model
    :param layer: full name of the decoding layer whose inputs share `max_overhead`; None
        without a limit
    :param is_seen: whether calibration has seen tokens of the inputs
    """

    inputs: list[SharedInput]
    layer: str | None = None
    is_seen: bool = True


def planning_units(
    inputs: list[SharedInput],
    value_projections: Mapping[str, ValueProjection],
    layers: Iterable[str],
    transformed: Collection[str],
) -> list[PlanningUnit]:
    """
    Divide inputs into units that are planned independently.

    An attention output and the input of its value projection are one unit. With a limit of
    overhead, all inputs of a decoding layer are one unit.

    :param value_projections: value projections to fuse blocks into, by the first Linear of
        the attention output
    :param layers: full names of the decoding layers with a limit of overhead
    :param transformed: names of the Linears with transformed inputs
    :raises ValueError: if a part of a decoding layer is transformed already
    """
    reader_of = {name: one.first for one in inputs for name in one.linears}
    units: dict[str, list[SharedInput]] = {}
    for one in inputs:
        layer = next((name for name in layers if one.first.startswith(f"{name}.")), None)
        key = one.first
        if layer is not None:
            key = f"{layer}."
        elif one.first in value_projections:
            key = reader_of.get(value_projections[one.first].linear, one.first)
        units.setdefault(key, []).append(one)
    for key in units:
        is_layer = key.endswith(".")
        if is_layer and any(name.startswith(key) for name in transformed):
            raise ValueError(
                f"{key[:-1]} is calibrated in parts, which cannot share `max_overhead`: leave "
                "`sequential_targets` of oneshot at its default"
            )
    return [
        PlanningUnit(members, key[:-1] if key.endswith(".") else None)
        for key, members in units.items()
    ]


def describe_input(
    shared: SharedInput,
    shards: int,
    layout: TransformLayout,
    statistics: InputStatistics | None,
    value_projection: ValueProjection | None,
    is_anything_quantized: bool,
) -> InputToPlan:
    """
    Collect the shape, statistics and quantization of an input.

    :param shards: tensor parallel shards of the input
    :param layout: largest layout of the transform
    :param statistics: statistics of all ranks; None if no token was seen
    :param value_projection: Linear to fuse the blocks into; None to apply them online
    :param is_anything_quantized: whether the recipe quantizes any Linear of the model
    """
    schemes = [getattr(one, "quantization_scheme", None) for one in shared.linears.values()]
    one = InputToPlan(
        names=tuple(shared.linears),
        in_features=shared.in_features,
        shards=shards,
        layout=layout,
        value_projection=value_projection,
        # a recipe of CATModifier alone: the model may be quantized later
        is_quantized=any(schemes) or not is_anything_quantized,
        is_clippable=_is_clippable(schemes),
    )
    changes: dict = {}
    scheme = next((one for one in schemes if one is not None), None)
    if scheme is not None:
        changes["weight_args"] = scheme.weights
        changes["activation_args"] = scheme.input_activations
    if statistics is not None:
        device = get_execution_device(shared.linears[shared.first])
        second_moments, sample = statistics.second_moments, statistics.sample
        if second_moments.mean is not None:
            changes["second_moments"] = second_moments.mean.to(device)
        changes["token_count"] = second_moments.count
        changes["tokens_read"] = statistics.tokens_read
        if sample.tokens is not None:
            changes["tokens"] = sample.tokens.to(device)
            changes["token_weights"] = sample.weights.to(device)
    return replace(one, **changes)


def _is_clippable(schemes: list[Any]) -> bool:
    """Whether all Linears quantize the input in the same way, and it allows clipping"""
    inputs = [scheme and scheme.input_activations for scheme in schemes]
    return all(args == inputs[0] and suits_clipping(args) for args in inputs)
