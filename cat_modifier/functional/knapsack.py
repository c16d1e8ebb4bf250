# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of options: the least noise for a limited cost."""

from collections.abc import Sequence

__all__ = ["spend"]


def spend(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int] | None:
    """
    Choose an option for each unit, so that the sum of noise is small.

    Start from the cheapest options. Then switch, again and again, to the option with the
    largest reduction of noise per added cost, until no switch fits the budget.

    :param options: list of options for each unit; an option is a pair of cost and noise
    :param budget: limit of the sum of costs
    :return: index of the chosen option of each unit; None if even the cheapest options cost
        more than the budget
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
