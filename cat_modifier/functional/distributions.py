# SPDX-License-Identifier: Apache-2.0
"""
Concentration of data from a known distribution. Weights and activations are compared with it.

A rotation that mixes many channels makes any data nearly normal. It brings concentration
near the level of the normal distribution, but rarely beyond it.
"""

from functools import cache

import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal

__all__ = ["expected_concentration"]

_GRID = 1500
"""Points of the quadrature: the result is accurate to 5 digits"""


def _laplace_tail(size: int) -> float:
    """Find a bound that a vector of this size exceeds with probability 1e-10"""
    return Laplace(0.0, 1.0).icdf(torch.tensor(1 - 0.5e-10 / size, dtype=torch.float64)).item()


@cache
def expected_concentration(
    distribution: str, in_features: int, symmetric: bool, group_size: int | None = None
) -> float:
    """
    Compute ``E||x||^2 / E[r(x)^2]`` of vectors of independent values of mean 0.

    Let m be the least and M the greatest value of a vector. The asymmetric range is
    ``r = max(M, 0) - min(m, 0)``. So ``E[r^2]`` is the sum of ``E[max(M, 0)^2]``, of
    ``E[min(m, 0)^2]``, and of twice the integral of ``P(m <= s, M > t)`` over
    ``s < 0 < t``. That probability is ``1 - P(m > s) - P(M <= t) + P(s < all <= t)``. All
    integrals are computed numerically.

    :param distribution: "normal" or "laplace"
    :param in_features: d, number of values of a vector
    :param symmetric: whether the range is symmetric, as in
        :func:`cat_modifier.functional.sqnr.quantization_range`
    :param group_size: number of values that share a range; None if all do. Squared ranges
        are averaged over the groups, like in
        :func:`cat_modifier.functional.sqnr.concentration`
    :return: ratio, without a unit
    :raises ValueError: if the distribution is not known
    """
    known: dict[str, Distribution] = {"normal": Normal(0.0, 1.0), "laplace": Laplace(0.0, 1.0)}
    if distribution not in known:
        raise ValueError(f"`distribution` must be one of {', '.join(known)}: {distribution}")
    data = known[distribution]
    size = group_size or in_features
    t = torch.linspace(0, _laplace_tail(size), _GRID, dtype=torch.float64)
    above = data.cdf(-t)  # P(x > t) = P(x < -t)

    if symmetric:
        # E[max|x|^2] = integral of 2 t P(max|x| > t)
        outside = 1 - _power(2 * above, size)
        return (in_features * data.variance / (4 * _integral(2 * t * outside, t))).item()
    one_side = _integral(2 * t * (1 - _power(above, size)), t)
    # P(min <= -s, max > t) over s, t > 0
    all_above = _power(above, size)[:, None]
    all_below = _power(above, size)[None, :]
    between = _power(above[:, None] + above[None, :], size)
    both = _integral(_integral(1 - all_above - all_below + between, t), t)
    return (in_features * data.variance / (2 * one_side + 2 * both)).item()


def _power(probability: Tensor, size: int) -> Tensor:
    """``(1 - probability)^size``, accurate for small probabilities"""
    return torch.exp(size * torch.log1p(-probability))


def _integral(values: Tensor, t: Tensor) -> Tensor:
    """Integrate over the last dimension"""
    return torch.trapezoid(values, t)
