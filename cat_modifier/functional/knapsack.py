# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of options that lower noise most for a limited cost."""

from collections.abc import Sequence

__all__ = ["spend"]


def spend(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int] | None:
    """
    Choose an option for each of several units, so that their noise adds up to little.

    Start from the cheapest options. Go on to the option that lowers noise most for the cost
    it adds, until nothing more can be paid.

    :param options: pairs of cost and noise, a list for each unit
    :param budget: limit for the sum of costs
    :return: index of the option of each unit; None if even the cheapest cost more
    """
    chosen = [min(range(len(one)), key=lambda i: one[i]) for one in options]
    left = budget - sum(one[index][0] for one, index in zip(options, chosen, strict=True))
    if left < 0:
        return None
    while True:
        best_gain, best = 0.0, None
        for unit, (one, index) in enumerate(zip(options, chosen, strict=True)):
            cost, noise = one[index]
            for other, (other_cost, other_noise) in enumerate(one):
                if not 0 < other_cost - cost <= left:
                    continue
                gain = (noise - other_noise) / (other_cost - cost)
                if gain > best_gain:
                    best_gain, best = gain, (unit, other)
        if best is None:
            return chosen
        unit, other = best
        left -= options[unit][other][0] - options[unit][chosen[unit]][0]
        chosen[unit] = other
