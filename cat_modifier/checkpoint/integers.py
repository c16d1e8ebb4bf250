# SPDX-License-Identifier: Apache-2.0
"""Rules for integer schemes: int8 matrix products, and clipping of activations."""

from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)

__all__ = [
    "INT8_PRODUCT_RULE",
    "bits_name",
    "is_integer",
    "packed_format",
    "suits_clipping",
    "suits_int8_product",
]

INT8_PRODUCT_RULE = (
    "integers of fewer than 8 bits are served with symmetric weights of strategy `channel` "
    "and dynamic activations of strategy `token`"
)


def is_integer(weights: QuantizationArgs | None, inputs: QuantizationArgs | None) -> bool:
    """Whether both weights and activations are quantized to integers"""
    return (
        weights is not None
        and inputs is not None
        and weights.type == inputs.type == QuantizationType.INT
    )


def bits_name(weights: QuantizationArgs | None, inputs: QuantizationArgs | None) -> str:
    """Name the bits of a scheme: W4A4 for integers, WF4AF4 for floats, W4A16"""
    parts = []
    for factor, args in (("W", weights), ("A", inputs)):
        kind = "" if args is None or args.type == QuantizationType.INT else "F"
        parts.append(f"{factor}{kind}{16 if args is None else args.num_bits}")
    return "".join(parts)


def suits_int8_product(
    weights: QuantizationArgs | None, inputs: QuantizationArgs | None
) -> bool:
    """
    Whether one int8 matrix product can compute a Linear.

    The result is then scaled once, per token and per output channel.
    """
    if weights is None or inputs is None:
        return False
    return (
        is_integer(weights, inputs)
        and max(weights.num_bits, inputs.num_bits) <= 8
        and weights.strategy == QuantizationStrategy.CHANNEL
        and weights.symmetric
        and not weights.dynamic
        and inputs.strategy == QuantizationStrategy.TOKEN
        and inputs.dynamic is True
    )


def packed_format(
    weights: QuantizationArgs | None, inputs: QuantizationArgs | None
) -> CompressionFormat | None:
    """
    Choose how to store integer weights of fewer than 8 bits.

    By default compressed-tensors stores them in 8 bits if activations are integers as well.
    Packed weights fill 32 bits, and each row ends with one.

    :return: the format; None to leave the choice to compressed-tensors
    """
    if not suits_int8_product(weights, inputs) or weights is None or weights.num_bits >= 8:
        return None
    if 32 % weights.num_bits:
        return CompressionFormat.int_quantized
    return CompressionFormat.pack_quantized


def suits_clipping(inputs: QuantizationArgs | None) -> bool:
    """Whether activations are asymmetric integers with a dynamic scale per token"""
    return (
        inputs is not None
        and inputs.type == QuantizationType.INT
        and inputs.strategy == QuantizationStrategy.TOKEN
        and inputs.dynamic is True
        and not inputs.symmetric
    )
