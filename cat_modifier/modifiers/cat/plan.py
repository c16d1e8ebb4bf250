# SPDX-License-Identifier: Apache-2.0
"""
Plan transforms from statistics, weights and options: pure functions on tensors.

Nothing here knows llm-compressor, changes a weight, or writes a file. The peak of memory is
one Linear in float64, however many Linears and inputs there are: weights are read one at a
time, and inverses are computed where they are needed and dropped. Where block sizes are chosen
under a limit, a transform of each size is computed once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.functional.alignment import diagonal_blocks, inner_blocks
from cat_modifier.functional.clipping import best_clip_ratio
from cat_modifier.functional.knapsack import spend
from cat_modifier.functional.layout import Rotation, TransformLayout, cheaper_layouts
from cat_modifier.functional.sqnr import alignment, concentration, energy, predicted_sqnr
from cat_modifier.functional.transform import (
    FusedTransform,
    StoredTransform,
    compute_transform,
    multiply_heads,
)

__all__ = [
    "InputToPlan",
    "Overhead",
    "OverheadUnit",
    "Plan",
    "PlanOptions",
    "PlannedTransform",
    "Prediction",
    "plan_transforms",
]

OverheadUnit = Literal["multiply-adds", "bytes"]
"""What `max_overhead` limits: work for long prompts, or reads for each generated token"""

_ROW = QuantizationArgs(num_bits=4, strategy="channel")
"""Quantization assumed where a recipe names none: 4 bits, one scale per row"""


@dataclass(frozen=True)
class PlanOptions:
    """
    Options of CATModifier for transforms. See its docstring.

    :param precision: dtype of stored blocks; None for int8 where it holds T well, else bfloat16
    :param max_overhead: limit for the inputs that are planned together; None for no limit
    :param overhead_unit: unit of the limit
    """

    rotation: Rotation
    alignment_strength: float
    dampening_frac: float
    clip_activations: bool
    precision: torch.dtype | None
    max_overhead: float | None
    overhead_unit: OverheadUnit = "multiply-adds"


@dataclass(frozen=True)
class InputToPlan:
    """
    One shared input: its Linears, statistics and quantization.

    :param names: Linears that read the input; the first holds the transform
    :param in_features: d, size of the input
    :param shards: tensor parallel shards of the input
    :param layout: largest layout of the transform
    :param second_moments: diagonal blocks of Sx, shape (d/k, k, k), k the block size of the
        layout; None if no token was seen
    :param token_count: number of tokens behind the second moments
    :param tokens_read: number of tokens of the calibration that read the input
    :param tokens: sample of tokens, shape (n, d), float32; None if no token was seen
    :param token_weights: weight of each token of the sample, shape (n,), float64
    :param weight_args: quantization of the weights; None for 16 bits
    :param activation_args: quantization of the input; None for 16 bits
    :param is_quantized: whether the recipe quantizes these Linears, or may do so
    :param is_clippable: whether ranges of the input may be clipped
    :param value_projection: Linear into whose rows the blocks are fused; None to apply
        them online
    """

    names: tuple[str, ...]
    in_features: int
    shards: int
    layout: TransformLayout
    second_moments: Tensor | None = None
    token_count: int = 0
    tokens_read: int = 0
    tokens: Tensor | None = None
    token_weights: Tensor | None = None
    weight_args: QuantizationArgs | None = field(default_factory=lambda: _ROW)
    activation_args: QuantizationArgs | None = field(default_factory=lambda: _ROW)
    is_quantized: bool = True
    is_clippable: bool = False
    value_projection: ValueProjection | None = None

    @property
    def first(self) -> str:
        """Name of the Linear that holds the transform"""
        return self.names[0]


@dataclass(frozen=True)
class Prediction:
    """
    Predicted SQNR and alignment of all Linears of an input together.

    Theorem 2.4, without clipping. Ratios of energies, without a unit.
    """

    sqnr: float
    alignment: float

    @property
    def noise(self) -> float:
        """Noise-to-signal ratio; 0 if nothing is quantized or there is no signal"""
        return 1 / self.sqnr if self.sqnr > 0 else 0.0


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


@dataclass(frozen=True)
class _Candidate:
    """
    A transform that an input can have.

    :param cost: cost at run time for one token, in the unit of the limit
    :param prediction: prediction with the transform; None if no token was seen
    """

    transform: StoredTransform
    cost: float
    prediction: Prediction | None


@dataclass(frozen=True)
class _Choice:
    """
    The transforms that an input can have.

    :param source: the input
    :param weight_cost: cost of its Linears for one token, in the unit of the limit
    :param candidates: transforms to choose from, the largest first
    :param before: prediction without a transform; None if no token was seen
    :param is_rotation: whether the candidates are rotations alone
    """

    source: InputToPlan
    weight_cost: float
    candidates: list[_Candidate]
    before: Prediction | None
    is_rotation: bool = False


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
            choice = _choose_alignment(one, planned, options)
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


def _choose_alignment(
    one: InputToPlan, weights: Mapping[str, Tensor], options: PlanOptions
) -> _Choice:
    """
    Compute the transforms that the input can have, or the rotation alone if it is predicted
    to be better.

    The rotation leaves alignment as it is, so it is computed where a transform loses any.

    :raises ValueError: if a prediction is not finite
    """
    aligned = _compute_candidates(one, weights, options)
    before = aligned.before
    after = [x.prediction for x in aligned.candidates if x.prediction is not None]
    if before is None or not math.isfinite(before.alignment):
        return aligned
    if not all(math.isfinite(x.alignment) for x in after):
        raise ValueError(
            "the transformed weights or inputs are not finite: lower `alignment_strength`, or "
            "raise `dampening_frac`"
        )
    if options.alignment_strength == 0 or after[0].alignment >= before.alignment:
        return aligned
    rotated = _compute_candidates(one, weights, replace(options, alignment_strength=0.0))
    rotation = rotated.candidates[0].prediction
    is_better = rotation is not None and _quality(rotation) > _quality(after[0])
    return replace(rotated, is_rotation=True) if is_better else aligned


def _quality(prediction: Prediction) -> float:
    """SQNR; alignment if nothing is quantized"""
    return prediction.sqnr if 0 < prediction.sqnr < math.inf else prediction.alignment


def _compute_candidates(
    one: InputToPlan, weights: Mapping[str, Tensor], options: PlanOptions
) -> _Choice:
    """Compute each transform that the input can have"""
    in_bytes = options.overhead_unit == "bytes"
    is_fused = one.value_projection is not None

    def cost(layout: TransformLayout, item_size: int = 1) -> float:
        if in_bytes:
            return 0 if is_fused else one.in_features * layout.stored_size * item_size
        return layout.multiply_adds(one.in_features, is_fused)

    layouts = [one.layout]
    if options.max_overhead is not None and not is_fused:
        layouts = cheaper_layouts(
            one.first, one.in_features, one.shards, one.layout, options.rotation, cost
        )
        # blocks larger than the token count would overfit
        layouts = [x for x in layouts if x.block_size <= one.token_count] or layouts

    dtype = torch.float64 if is_fused else options.precision or torch.int8
    stored = []
    for layout in layouts:
        size = layout.stored_size
        shape = (one.in_features // size, size, size)
        # allocate what outlives the temporaries first: between them it would leave gaps as
        # large as the model
        stored.append(torch.empty(shape, dtype=dtype, device=_device(one, weights)))

    sw = torch.zeros((), dtype=torch.float64)
    weight_cost = 0.0
    bits = one.weight_args.num_bits if one.is_quantized and one.weight_args else 16
    for name in one.names:
        weight = weights[name]
        sw = diagonal_blocks(weight, one.layout.block_size) + sw.to(weight.device)
        weight_cost += weight.numel() * (bits / 8 if in_bytes else 1)
    transforms = []
    for layout, blocks in zip(layouts, stored, strict=True):
        size, sx = layout.block_size, one.second_moments
        transform = compute_transform(
            None if sx is None else inner_blocks(sx, size),
            inner_blocks(sw, size),
            layout,
            options.rotation,
            options.alignment_strength,
            options.dampening_frac,
            blocks,
            1 if one.value_projection is None else one.value_projection.repeats,
            torch.bfloat16 if options.precision is None else None,
        )
        transforms.append(transform)
    # also without tokens: a singular transform must fail before any weight is written
    fused = [transform.invert() for transform in transforms]
    before, after = _predict(one, weights, fused)
    candidates = [
        _Candidate(transform, cost(layout, transform.blocks.itemsize), prediction)
        for transform, layout, prediction in zip(transforms, layouts, after, strict=True)
    ]
    return _Choice(one, weight_cost, candidates, before)


def _device(one: InputToPlan, weights: Mapping[str, Tensor]) -> torch.device:
    if one.second_moments is not None:
        return one.second_moments.device
    return weights[one.first].device


class _PredictionSums:
    """
    Sums over the Linears of an input. Linears are added one at a time.

    :param tokens: sample of the input, transformed, shape (n, d), float64
    """

    def __init__(self, one: InputToPlan, tokens: Tensor):
        self._one, self._tokens = one, tokens
        self._weight_energy = self._output_energy = self._squared_ranges = 0.0

    def add(self, weight: Tensor):
        """
        Add a Linear.

        :param weight: shape (out, d), float64
        """
        weight_energy = weight.square().sum().item()
        self._weight_energy += weight_energy
        self._output_energy += energy(self._tokens @ weight.T, self._one.token_weights)
        # the squared ranges of all Linears add up, like their energies
        if weight_energy:
            args = self._one.weight_args or _ROW
            self._squared_ranges += weight_energy / concentration(weight, args)

    def result(self) -> Prediction:
        """Predict SQNR and alignment of all Linears together"""
        one, tokens = self._one, self._tokens
        aligned = alignment(
            self._output_energy, self._weight_energy, energy(tokens, one.token_weights)
        )
        ranges = self._squared_ranges
        sqnr = predicted_sqnr(
            one.weight_args and one.weight_args.num_bits,
            one.activation_args and one.activation_args.num_bits,
            self._weight_energy / ranges if ranges else math.nan,
            concentration(tokens, one.activation_args or _ROW, one.token_weights),
            aligned,
        )
        return Prediction(sqnr.joint, aligned)


def _predict(
    one: InputToPlan, weights: Mapping[str, Tensor], transforms: list[FusedTransform]
) -> tuple[Prediction | None, list[Prediction | None]]:
    """
    Predict SQNR and alignment.

    :return: without a transform, and with each transform; None if no token was seen
    """
    if one.tokens is None:
        return None, [None] * len(transforms)
    tokens = one.tokens.to(torch.float64)
    before = _PredictionSums(one, tokens)
    after = [
        _PredictionSums(one, transform.transform_tokens(tokens)) for transform in transforms
    ]
    for name in one.names:
        weight = weights[name]
        before.add(weight)
        for sums, transform in zip(after, transforms, strict=True):
            sums.add(transform.transform_weight(weight))
    return before.result(), [sums.result() for sums in after]


def _choose(
    choices: Sequence[_Choice], limit: float, unit: OverheadUnit, layer: str
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


def _noise(one: InputToPlan, candidate: _Candidate) -> float:
    if not one.is_quantized or candidate.prediction is None:
        return 0.0
    return candidate.prediction.noise


def _finish(choice: _Choice, index: int, options: PlanOptions) -> PlannedTransform:
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
