# SPDX-License-Identifier: Apache-2.0
"""The transforms that an input can have: computed, rounded as stored, and predicted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cat_modifier.functional.alignment import diagonal_blocks, inner_blocks
from cat_modifier.functional.layout import TransformLayout, cheaper_layouts
from cat_modifier.functional.transform import StoredTransform, compute_blocks, store_transform
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan
from cat_modifier.modifiers.cat.plan_options import PlanOptions
from cat_modifier.modifiers.cat.prediction import Prediction, predict

__all__ = ["Candidate", "Choice", "transforms_to_choose_from"]


@dataclass(frozen=True)
class Candidate:
    """
    A transform that an input can have.

    :param cost: cost at run time for one token, in the unit of the limit
    :param prediction: prediction with the transform; None if no token was seen
    """

    transform: StoredTransform
    cost: float
    prediction: Prediction | None


@dataclass(frozen=True)
class Choice:
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
    candidates: list[Candidate]
    before: Prediction | None
    is_rotation: bool = False


def transforms_to_choose_from(
    one: InputToPlan, weights: Mapping[str, Tensor], options: PlanOptions
) -> Choice:
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
) -> Choice:
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
    # `precision: auto` takes int8 where that holds T well
    alternative = torch.bfloat16 if options.precision is None else None
    transforms = [
        store_transform(_compute_blocks(one, sw, layout, options), layout, room, alternative)
        for layout, room in zip(layouts, stored, strict=True)
    ]
    # also without tokens: a singular transform must fail before any weight is written
    fused = [transform.invert() for transform in transforms]
    before, after = predict(one, weights, fused)
    candidates = [
        Candidate(transform, cost(layout, transform.blocks.itemsize), prediction)
        for transform, layout, prediction in zip(transforms, layouts, after, strict=True)
    ]
    return Choice(one, weight_cost, candidates, before)


def _compute_blocks(
    one: InputToPlan, sw: Tensor, layout: TransformLayout, options: PlanOptions
) -> Tensor:
    """
    Compute T, float64.

    :param sw: diagonal blocks of the sum of ``W^T W`` of the Linears, float64; at least as
        large as those of the layout
    """
    strength, sw = options.alignment_strength, inner_blocks(sw, layout.block_size)
    if one.second_moments is None:  # never seen: the rotation alone
        identity = torch.eye(layout.block_size, dtype=torch.float64, device=sw.device)
        strength, sx = 0.0, identity.expand_as(sw)
    else:
        sx = inner_blocks(one.second_moments, layout.block_size).to(sw.device, torch.float64)
    # attention heads that share one value head have one block. The best one for all of them
    # depends on the sums of their second moments
    repeats = 1 if one.value_projection is None else one.value_projection.repeats
    sx, sw = (blocks.unflatten(0, (-1, repeats)).sum(1) for blocks in (sx, sw))
    blocks = compute_blocks(
        sx, sw, options.rotation, layout.fused_hadamard_size, strength, options.dampening_frac
    )
    return blocks.repeat_interleave(repeats, 0)


def _device(one: InputToPlan, weights: Mapping[str, Tensor]) -> torch.device:
    if one.second_moments is not None:
        return one.second_moments.device
    return weights[one.first].device
