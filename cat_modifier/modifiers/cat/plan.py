# SPDX-License-Identifier: Apache-2.0
"""Transforms of a decoding layer under a budget of multiply-adds"""

from dataclasses import dataclass

from compressed_tensors.distributed import is_source_process
from loguru import logger

from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.knapsack import spend
from cat_modifier.functional.layout import TransformLayout

__all__ = ["Candidates", "choose_layouts"]


@dataclass(frozen=True)
class Candidates:
    """
    What the transform of an input can be.

    :param group: the Linears which read it
    :param count: tokens of the input: an expert sees a part of all
    :param layouts: to choose from
    :param costs: multiply-adds of each at run time, for a token
    :param noises: noise-to-signal ratio of the outputs with each, predicted
    """

    group: SharedInput
    count: int
    layouts: list[TransformLayout]
    costs: list[int]
    noises: list[float]


def choose_layouts(
    layer: str, inputs: list[Candidates], budget: float
) -> dict[str, TransformLayout]:
    """
    :param layer: name, for messages
    :param inputs: of the layer, which saw tokens
    :param budget: for the multiply-adds of transforms, relative to those of all Linears
    :return: by the owner of the input
    :raises ValueError: if the budget does not suffice for the cheapest candidates
    """
    products = sum(
        one.count * linear.in_features * linear.out_features
        for one in inputs
        for linear in one.group.linears.values()
    )
    most = max(one.count for one in inputs)
    options = [
        [
            # an input of few tokens adds as little to the noise of the layer as to its cost
            (one.count * cost / products, one.count * noise / most)
            for cost, noise in zip(one.costs, one.noises, strict=True)
        ]
        for one in inputs
    ]
    chosen = spend(options, budget)
    if chosen is None:
        least = sum(min(cost for cost, _ in found) for found in options)
        raise ValueError(
            f"The cheapest transforms add {least:.2%} to the multiply-adds of {layer}, more "
            f"than the `budget` of {budget:.2%}: raise it, or, if the `rotation` is "
            "`hadamard`, choose `block-hadamard`, which costs nothing beside the blocks"
        )
    if is_source_process():
        spent = sum(found[index][0] for found, index in zip(options, chosen, strict=True))
        largest = sum(max(cost for cost, _ in found) for found in options)
        logger.info(
            f"{layer}: transforms add {spent:.2%} to the multiply-adds, of a budget of "
            f"{budget:.2%}; the largest would add {largest:.2%}"
        )
    return {
        one.group.first: one.layouts[index]
        for one, index in zip(inputs, chosen, strict=True)
    }
