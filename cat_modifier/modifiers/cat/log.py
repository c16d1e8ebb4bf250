# SPDX-License-Identifier: Apache-2.0
"""What a transform did to one group of Linears, for the log"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from loguru import logger
from torch import Tensor

from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.layout import TransformLayout
from cat_modifier.functional.sqnr import (
    alignment,
    concentration,
    energy,
    predicted_sqnr,
    to_db,
)
from cat_modifier.functional.alignment import condition_number

__all__ = ["GroupReport", "predicted_noise"]

_ROW = QuantizationArgs(num_bits=4, strategy="channel")
"""One scale a row, where a recipe does not say"""


@dataclass(frozen=True)
class GroupReport:
    """
    :param group: the Linears
    :param layout: of their transform
    :param tokens: which the moments are of
    :param bits: of weights and activations for which SQNR is predicted; None if they are
        not quantized
    :param is_float: whether they are to be quantized to floats, of which theorem 2.4 does
        not speak
    :param sqnr: predicted by theorem 2.4 before and after, ratios
    :param alignment: before and after, ratios
    :param condition_number: of the transform as stored
    :param clip_ratio: of the range of activations, which predictions leave out
    """

    group: SharedInput
    layout: TransformLayout
    tokens: int
    bits: tuple[int | None, int | None]
    is_float: bool
    sqnr: tuple[float, float]
    alignment: tuple[float, float]
    condition_number: float
    clip_ratio: float

    @classmethod
    def measure(
        cls,
        group: SharedInput,
        layout: TransformLayout,
        blocks: Tensor,
        count: int,
        token_weights: Tensor,
        clip_ratio: float,
        before: tuple[Tensor, dict[str, Tensor]],
        after: tuple[Tensor, dict[str, Tensor]],
    ) -> "GroupReport":
        """
        :param blocks: transform as stored, shape (d/k, k, k)
        :param count: tokens which the moments are of
        :param token_weights: of the sample, shape (tokens,), float64
        :param clip_ratio: of the range of activations
        :param before: sample of the input, shape (tokens, d), float64; and weights by name,
            each of shape (out, d), float64
        :param after: the same, transformed
        """
        weight_args, input_args = _quantization_args(group)
        sqnr, alignments = zip(
            *(_predict(group, x, linears, token_weights) for x, linears in (before, after)),
            strict=True,
        )
        return cls(
            group,
            layout,
            count,
            tuple(args and args.num_bits for args in (weight_args, input_args)),
            weight_args is not None and weight_args.type == QuantizationType.FLOAT,
            sqnr,
            alignments,
            condition_number(blocks),
            clip_ratio,
        )

    def log(self):
        """One line, and a warning if there were too few tokens"""
        members = [name.rpartition(".")[2] for name in self.group.linears]
        shown = "/".join(members[:4]) + ("/..." if len(members) > 4 else "")
        prefix = self.group.first.rpartition(".")[0]
        logger.info(
            f"{prefix}.{shown}: predicted W{self.bits[0] or 16}A{self.bits[1] or 16} SQNR"
            f"{' as integers' if self.is_float else ''} "
            f"{to_db(self.sqnr[0]):.1f} -> {to_db(self.sqnr[1]):.1f} dB, alignment "
            f"{to_db(self.alignment[0]):.1f} -> {to_db(self.alignment[1]):.1f} dB, "
            f"block size {self.layout.block_size}, Hadamard size "
            f"{self.layout.hadamard_size}, condition number {self.condition_number:.1f}"
            + (f", range clipped to {self.clip_ratio:.2f}" if self.clip_ratio < 1 else "")
            + (f" ({self.layout.remark})" if self.layout.remark else "")
        )
        if self.tokens < self.layout.block_size:
            logger.warning(
                f"{self.group.first}: {self.tokens} calibration tokens do not determine "
                f"blocks of {self.layout.block_size} channels, which depend on `dampening_frac` "
                "then: use more or longer samples"
            )


def predicted_noise(
    group: SharedInput, tokens: Tensor, weights: Mapping[str, Tensor], token_weights: Tensor
) -> float:
    """
    Noise-to-signal ratio of the outputs of a group, predicted by theorem 2.4.

    :param tokens: sample of the input, shape (tokens, d), float64
    :param weights: by name, each of shape (out, d), float64
    :param token_weights: of the sample, shape (tokens,), float64
    :return: 0 if nothing is quantized, or if there is no signal
    """
    sqnr, _ = _predict(group, tokens, weights, token_weights)
    return 1 / sqnr if sqnr > 0 else 0.0


def _predict(
    group: SharedInput, tokens: Tensor, weights: Mapping[str, Tensor], token_weights: Tensor
) -> tuple[float, float]:
    """SQNR and alignment"""
    weight_args, input_args = _quantization_args(group)
    energies = [one.square().sum().item() for one in weights.values()]
    outputs = [energy(tokens @ one.T, token_weights) for one in weights.values()]
    aligned = alignment(sum(outputs), sum(energies), energy(tokens, token_weights))
    # squared ranges are summed over the Linears, as energies are
    squared_ranges = sum(
        one / concentration(weight, weight_args or _ROW)
        for one, weight in zip(energies, weights.values(), strict=True)
        if one
    )
    sqnr = predicted_sqnr(
        weight_args and weight_args.num_bits,
        input_args and input_args.num_bits,
        sum(energies) / squared_ranges if squared_ranges else math.nan,
        concentration(tokens, input_args or _ROW, token_weights),
        aligned,
    )
    return sqnr.joint, aligned


def _quantization_args(
    group: SharedInput,
) -> tuple[QuantizationArgs | None, QuantizationArgs | None]:
    """Of weights and inputs, as the recipe will quantize them; 4 bits if it does not say"""
    scheme = getattr(group.linears[group.first], "quantization_scheme", None)
    if scheme is None:
        return _ROW, _ROW
    return scheme.weights, scheme.input_activations
