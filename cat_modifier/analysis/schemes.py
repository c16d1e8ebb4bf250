# SPDX-License-Identifier: Apache-2.0
"""Quantization schemes by the names which people call them by, as W4A8"""

import re
from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs

__all__ = ["Scheme"]

_NAME = re.compile(r"W(\d+)(?:G(\d+))?A(\d+)(?:G(\d+))?")


@dataclass(frozen=True)
class Scheme:
    """
    Quantization of the weights and activations of a Linear to integers.

    :param name: for tables
    :param weights: None if they are not quantized
    :param activations: None if they are not quantized
    """

    name: str
    weights: QuantizationArgs | None
    activations: QuantizationArgs | None

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """
        :param name: ``W4A8``: weights of 4 bits, symmetric, with a scale for each output
            channel; activations of 8 bits, asymmetric, with a scale for each token. 16 bits
            are not quantized. ``W4G64A4G64``: with a scale for each 64 input channels
        :raises ValueError: if it is no such name
        """
        match = _NAME.fullmatch(name.upper())
        bits = match and (int(match[1]), int(match[3]))
        is_known = match is not None and all(2 <= b <= 8 or b == 16 for b in bits)
        if not is_known or bits == (16, 16) or "0" in match.groups():
            raise ValueError(
                f"Unknown scheme {name!r}: it should be like W4A4, W4A8 or W4G64A4G64 (groups "
                "of 64 channels), with 2 to 8 bits, or 16 for what is left as it is"
            )
        weights, activations = (
            None
            if b == 16
            else QuantizationArgs(
                num_bits=b,
                symmetric=symmetric,
                strategy="group" if group else strategy,
                group_size=int(group) if group else None,
                dynamic=not symmetric,
            )
            for b, group, strategy, symmetric in (
                (bits[0], match[2], "channel", True),
                (bits[1], match[4], "token", False),
            )
        )
        return cls(name.upper(), weights, activations)

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Of weights and of activations; None if they are not quantized"""
        return (
            self.weights and self.weights.num_bits,
            self.activations and self.activations.num_bits,
        )
