# SPDX-License-Identifier: Apache-2.0
"""
Signal-to-quantization-noise ratio of a quantized Linear, factorised into bit width,
concentration and alignment (arXiv 2603.04359, lemmas 2.1-2.3 and theorem 2.4).

Ratios are plain numbers unless a name ends in ``_db``; ``to_db`` is ``10 log10``.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "activation_concentration",
    "alignment",
    "predicted_sqnr",
    "quantization_range",
    "to_db",
    "weight_concentration",
]


def to_db(ratio: float) -> float:
    """``10 log10(ratio)``; -inf for a ratio of 0, nan for nan"""
    if math.isnan(ratio):
        return math.nan
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def quantization_range(x: Tensor, symmetric: bool) -> Tensor:
    """
    Width of the range which a quantizer spans for each vector that shares a scale:
    ``2 max|x_i|`` if symmetric, else ``max(x, 0) - min(x, 0)``: zero is always in it.

    :param x: shape (..., d)
    :return: shape (...)
    """
    if symmetric:
        return 2 * x.abs().amax(-1)
    return x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)


def activation_concentration(x: Tensor, symmetric: bool) -> float:
    """
    ``C(x) = E||x||^2 / E[r(x)^2]`` with one scale a token [lemma 2.2].

    :param x: tokens, shape (tokens, d), floating point
    """
    x = x.to(torch.float64)
    return (x.square().sum() / quantization_range(x, symmetric).square().sum()).item()


def weight_concentration(weights: list[Tensor], symmetric: bool) -> float:
    """
    ``C(W) = sum_j ||w_j||^2 / sum_j r(w_j)^2`` over the rows j of all weights, with one
    scale a row [lemma 2.3].

    :param weights: each of shape (out, d)
    """
    energy = sum(w.double().square().sum() for w in weights)
    ranges = sum(quantization_range(w.double(), symmetric).square().sum() for w in weights)
    return (energy / ranges).item()


def alignment(output_energy: float, weight_energy: float, input_energy: float) -> float:
    """
    ``A(x, W) = E||W x||^2 / (||W||_F^2 E||x||^2)``, between 0 and 1.

    :param output_energy: ``E||W x||^2``, summed over the Linears of a group
    :param weight_energy: ``||W||_F^2``, summed over the Linears of a group
    :param input_energy: ``E||x||^2``
    :return: nan if the weight or the input is zero
    """
    product = weight_energy * input_energy
    return output_energy / product if product else math.nan


def predicted_sqnr(
    weight_bits: int | None,
    activation_bits: int | None,
    weight_concentration: float,
    activation_concentration: float,
    alignment: float,
) -> float:
    """
    Theorem 2.4 for any two bit widths: the parallel sum of ``12 N(b)^2 C A`` over weights
    and activations, where ``N(b) = 2^b - 1`` intervals.

    :param weight_bits: None if weights are not quantized; the same for activations
    :return: the ratio of the energies of ``W x`` and of its error; nan if either is zero
    """
    noise = 0.0
    for bits, concentration in (
        (weight_bits, weight_concentration),
        (activation_bits, activation_concentration),
    ):
        if bits is not None:
            signal = 12 * (2**bits - 1) ** 2 * concentration * alignment
            noise += 1 / signal if signal else math.nan
    return 1 / noise if noise else math.inf
