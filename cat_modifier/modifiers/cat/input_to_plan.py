# SPDX-License-Identifier: Apache-2.0
"""What is known of an input before its transform is planned."""

from dataclasses import dataclass, field

from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.functional.layout import TransformLayout

__all__ = ["ASSUMED", "InputToPlan"]

ASSUMED = QuantizationArgs(num_bits=4, strategy="channel")
"""Quantization assumed where a recipe names none: 4 bits, one scale per row"""


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
    weight_args: QuantizationArgs | None = field(default_factory=lambda: ASSUMED)
    activation_args: QuantizationArgs | None = field(default_factory=lambda: ASSUMED)
    is_quantized: bool = True
    is_clippable: bool = False
    value_projection: ValueProjection | None = None

    @property
    def first(self) -> str:
        """Name of the Linear that holds the transform"""
        return self.names[0]
