# SPDX-License-Identifier: Apache-2.0
"""Transforms of a decoding layer under a budget of multiply-adds"""

from dataclasses import dataclass

from loguru import logger

from cat_modifier.calibration.groups import InputGroup
from cat_modifier.mathematics.budget import spend
from cat_modifier.mathematics.geometry import Geometry

__all__ = ["Candidate", "choose_geometries"]


@dataclass(frozen=True)
class Candidate:
    """
    :param geometry: which a transform can have
    :param multiply_adds: at run time, for a token
    :param noise: noise-to-signal ratio of the outputs, predicted
    """

    geometry: Geometry
    multiply_adds: int
    noise: float


def choose_geometries(
    layer: str,
    groups: list[InputGroup],
    counts: list[int],
    candidates: list[list[Candidate]],
    budget: float,
) -> list[Geometry]:
    """
    :param layer: name, for messages
    :param groups: the Linears of each input of the layer
    :param counts: tokens of each input, as experts see a part of all
    :param candidates: for each input
    :param budget: for the multiply-adds of transforms, relative to those of all Linears
    :return: for each input
    :raises ValueError: if the budget does not suffice for the cheapest candidates
    """
    products = sum(
        count * linear.in_features * linear.out_features
        for count, group in zip(counts, groups, strict=True)
        for linear in group.linears.values()
    )
    options = [
        [(count * one.multiply_adds / products, one.noise) for one in found]
        for count, found in zip(counts, candidates, strict=True)
    ]
    least = sum(min(cost for cost, _ in found) for found in options)
    if least > budget:
        raise ValueError(
            f"The smallest transforms add {least:.2%} to the multiply-adds of "
            f"{layer or 'the Linears'}, more than the `budget` of {budget:.2%}: raise it, or "
            "choose a `rotation` which is folded into the blocks"
        )
    chosen = spend(options, budget)
    spent = sum(found[index][0] for found, index in zip(options, chosen, strict=True))
    logger.info(
        f"{layer or 'Linears'}: transforms add {spent:.2%} to the multiply-adds, of a budget "
        f"of {budget:.2%}"
    )
    return [found[index].geometry for found, index in zip(candidates, chosen, strict=True)]
