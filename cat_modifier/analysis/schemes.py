# SPDX-License-Identifier: Apache-2.0
"""Quantization schemes and their usual names, such as W4A8."""

import re
from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs

__all__ = ["Scheme"]

_NAME = re.compile(r"W([2-8]|16)(?:G([1-9]\d*))?A([2-8]|16)(?:G([1-9]\d*))?")


@dataclass(frozen=True)
class Scheme:
    """
    Integer quantization of the weights and activations of a Linear.

    :param name: name in tables
    :param weights: quantization of the weights; None for no quantization
    :param activations: quantization of the activations; None for no quantization
    """

    name: str
    weights: QuantizationArgs | None
    activations: QuantizationArgs | None

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """
        Parse the name of a scheme.

        :param name: ``W4A8`` for symmetric 4-bit weights with a scale per output channel and
            asymmetric 8-bit activations with a scale per token. ``W4G64A4G64`` for a scale
            per 64 input channels. 16 bits are not quantized
        :raises ValueError: if the name has another form
        """
        match = _NAME.fullmatch(name.upper())
        if match is None or match[1] == match[3] == "16":
            raise ValueError(
                f"Unknown scheme {name!r}: it should be like W4A4, W4A8 or W4G64A4G64 (groups "
                "of 64 channels), with 2 to 8 bits, or 16 for no quantization"
            )
        weights = _integers(match[1], match[2], "channel")
        return cls(name.upper(), weights, _integers(match[3], match[4], "token"))

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of weights, bits of activations; None where nothing is quantized"""
        weights, activations = self.weights, self.activations
        return weights and weights.num_bits, activations and activations.num_bits

    def check(self, name: str, in_features: int):
        """
        Check that groups divide the input of a Linear.

        :param name: name of the Linear, for the error
        :raises ValueError: if they do not
        """
        sizes = (args.group_size for args in (self.weights, self.activations) if args)
        if wrong := [size for size in sizes if size and in_features % size]:
            raise ValueError(
                f"Groups of {wrong[0]} channels (scheme {self.name}) do not divide the "
                f"{in_features} inputs of {name}: choose another size, or add the Linear to "
                "`ignore`"
            )


def _integers(bits: str, group_size: str | None, strategy: str) -> QuantizationArgs | None:
    if bits == "16":
        return None
    return QuantizationArgs(
        num_bits=int(bits),
        symmetric=strategy == "channel",
        strategy="group" if group_size else strategy,
        group_size=group_size and int(group_size),
        dynamic=strategy == "token",
    )
