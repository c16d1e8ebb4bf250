# SPDX-License-Identifier: Apache-2.0
"""
Plan transforms from statistics, weights and options: pure functions on tensors.

Nothing here knows llm-compressor, changes a weight, or writes a file. The peak of memory is
one Linear in float64, however many Linears and inputs there are: weights are read one at a
time, and inverses are computed where they are needed and dropped. Where block sizes are chosen
under a limit, a transform of each size is computed once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.functional.clipping import best_clip_ratio
from cat_modifier.functional.knapsack import spend
from cat_modifier.functional.layout import TransformLayout
from cat_modifier.functional.transform import StoredTransform, multiply_heads
from cat_modifier.modifiers.cat.candidates import (
    Candidate,
    Choice,
    transforms_to_choose_from,
)
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan
from cat_modifier.modifiers.cat.plan_options import OverheadUnit, PlanOptions
from cat_modifier.modifiers.cat.prediction import Prediction

__all__ = ["Overhead", "Plan", "PlannedTransform", "plan_transforms"]


@dataclass(frozen=True)
class PlannedTransform:
    """
    The transform of one shared input, ready to be applied.

    :param source: the input
    :param transform: T as stored. Inverses are not kept: for all experts of a decoding layer
        they would be as large as the layer
    :param clip_ratio: clipped range of a token over the range of its values; 1 does not clip
    :param before: prediction without the transform; None if no token was seen
    :param after: prediction with the transform; None if no token was seen
    :param is_rotation: whether the rotation alone is used, since alignment would lose SQNR
    """

    source: InputToPlan
    transform: StoredTransform
    clip_ratio: float
    before: Prediction | None
    after: Prediction | None
    is_rotation: bool = False

    @property
    def layout(self) -> TransformLayout:
        return self.transform.layout

    @property
    def is_fused(self) -> bool:
        """Whether the blocks are fused into a value projection"""
        return self.source.value_projection is not None


@dataclass(frozen=True)
class Overhead:
    """
    Cost of transforms at run time, over that of their Linears: multiply-adds, or bytes.

    :param planned: sum over the planned transforms
    :param largest: sum if all blocks had the largest size
    """

    planned: float
    largest: float


@dataclass(frozen=True)
class Plan:
    """
    Transforms that were planned together.

    :param transforms: one transform per input
    :param overhead: overhead of the transforms; None without a limit
    """

    transforms: list[PlannedTransform]
    overhead: Overhead | None


class _PlannedWeights(Mapping[str, Tensor]):
    """
    Weights in float64, with the blocks that are planned to be fused into their rows.

    :param weights: weights by the name of the Linear, shape (out, d), any dtype
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights
        self._blocks: dict[str, Tensor] = {}

    def fuse(self, projection: ValueProjection, blocks: Tensor):
        """
        Note blocks to be fused.

        :param blocks: one block per head of the attention output
        """
        self._blocks[projection.linear] = blocks[:: projection.repeats]

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name].to(torch.float64)
        blocks = self._blocks.get(name)
        return weight if blocks is None else multiply_heads(weight, blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def plan_transforms(
    inputs: Sequence[InputToPlan],
    weights: Mapping[str, Tensor],
    options: PlanOptions,
    layer: str = "",
) -> Plan:
    """
    Plan the transforms of inputs that depend on each other.

    These are an attention output and the input of its value projection, or all inputs of a
    decoding layer under a limit.

    :param inputs: inputs whose transforms are planned together
    :param weights: weights by the name of the Linear, shape (out, d), any dtype; read one at
        a time
    :param options: see :class:`PlanOptions`
    :param layer: name of the decoding layer, for messages
    :raises ValueError: if second moments are not finite, a transform is singular as stored,
        or even the cheapest transforms exceed the limit
    """
    # attention outputs first: their blocks change the weights of value projections
    ordered = sorted(inputs, key=lambda one: one.value_projection is None)
    planned = _PlannedWeights(weights)
    choices = []
    for one in ordered:
        try:
            choice = transforms_to_choose_from(one, planned, options)
        except ValueError as error:
            raise ValueError(f"Cannot transform the input of {one.first}: {error}") from error
        if one.value_projection is not None:
            planned.fuse(one.value_projection, choice.candidates[0].transform.blocks)
        choices.append(choice)

    chosen, overhead = [0] * len(choices), None
    if options.max_overhead is not None:
        chosen, overhead = _choose(choices, options.max_overhead, options.overhead_unit, layer)
    transforms = [
        _finish(choice, index, options) for choice, index in zip(choices, chosen, strict=True)
    ]
    return Plan(transforms, overhead)


def _choose(
    choices: Sequence[Choice], limit: float, unit: OverheadUnit, layer: str
) -> tuple[list[int], Overhead]:
    """
    Choose the transforms of least predicted noise under a limit of cost.

    :return: index of the candidate of each input
    :raises ValueError: if even the cheapest transforms exceed the limit
    """
    products = sum(one.source.tokens_read * one.weight_cost for one in choices)
    most = max(one.source.tokens_read for one in choices)
    costs = []
    for one in choices:
        count = one.source.tokens_read
        # weight noise and cost by tokens: experts that see few of them matter little
        costs.append(
            [
                (count * x.cost / products, count * _noise(one.source, x) / most)
                for x in one.candidates
            ]
        )
    chosen = spend(costs, limit)
    if chosen is None:
        least = sum(min(cost for cost, _ in found) for found in costs)
        raise ValueError(
            f"The cheapest transforms add {least:.2%} to the {unit} of {layer}, more than "
            f"`max_overhead`, {limit:.2%}: raise it, or, if the `rotation` is `hadamard`, "
            "choose `block-hadamard`, which costs nothing beside the blocks"
        )
    return chosen, Overhead(
        sum(found[index][0] for found, index in zip(costs, chosen, strict=True)),
        sum(max(cost for cost, _ in found) for found in costs),
    )


def _noise(one: InputToPlan, candidate: Candidate) -> float:
    if not one.is_quantized or candidate.prediction is None:
        return 0.0
    return candidate.prediction.noise


def _finish(choice: Choice, index: int, options: PlanOptions) -> PlannedTransform:
    """Take the chosen transform, and choose the clip ratio of the transformed input"""
    one, candidate = choice.source, choice.candidates[index]
    clip_ratio = 1.0
    args = one.activation_args
    if options.clip_activations and one.is_clippable and args and one.tokens is not None:
        tokens = candidate.transform.transform_tokens(one.tokens.to(torch.float64))
        clip_ratio = best_clip_ratio(tokens, args, one.token_weights)
    return PlannedTransform(
        one,
        candidate.transform,
        clip_ratio,
        choice.before,
        candidate.prediction,
        choice.is_rotation,
    )
