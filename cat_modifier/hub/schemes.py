# SPDX-License-Identifier: Apache-2.0
"""What a ``quantization_config`` means for somebody who chooses a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs

from cat_modifier.checkpoint.integers import (
    INT8_PRODUCT_RULE,
    is_integer,
    suits_int8_product,
)
from cat_modifier.checkpoint.schema import CATTransformConfig, read_quantization_config

__all__ = ["Schemes", "describe_schemes", "is_scheme_tag"]

_TAG = re.compile(r"w\d+a\d+|int\d+|fp8|nvfp4|mxfp4")


@dataclass(frozen=True)
class Schemes:
    """
    :param label: short, for a heading: W4A4
    :param text: for a sentence: 4-bit weights and 4-bit activations
    :param tags: tags of the card
    :param products: hardware, and what it computes, a row for each
    """

    label: str
    text: str
    tags: list[str]
    products: list[tuple[str, str]]


def is_scheme_tag(tag: str) -> bool:
    """Whether a tag of a card says how a checkpoint is quantized"""
    return _TAG.fullmatch(tag) is not None


def describe_schemes(quantization_config: Mapping[str, Any]) -> Schemes:
    """
    Describe the schemes of a CAT checkpoint.

    :param quantization_config: object of this name in ``config.json``
    :raises ValueError: if it is damaged, or not that of a CAT checkpoint
    """
    read = read_quantization_config(dict(quantization_config))
    if read is None:
        raise ValueError("The checkpoint has no CAT transforms")
    kinds, are_served = [], True
    for group in read[0]["config_groups"].values():
        weights, inputs = group.get("weights"), group.get("input_activations")
        bits = (16 if weights is None else weights["num_bits"], _bits(inputs))
        kind = (*bits, _number_type(weights or inputs))
        if kind not in kinds:
            kinds.append(kind)
        are_served &= _is_served(weights, inputs, group.get("format") or read[0].get("format"))
    labels = [
        f"W{w}A{a}" if number.startswith("int") else f"{number.upper()} W{w}A{a}"
        for w, a, number in kinds
    ]
    sizes = " and ".join(
        f"{w}-bit weights and {a}-bit activations ({number.upper()})" for w, a, number in kinds
    )
    tags = [f"w{w}a{a}" for w, a, _ in kinds] + [number for *_, number in kinds]
    return Schemes(
        label=", ".join(labels),
        text=sizes,
        tags=list(dict.fromkeys(tags)),
        products=_products(kinds, _has_experts(read[1]))
        if are_served
        else [("any", f"nothing in vLLM: {INT8_PRODUCT_RULE}")],
    )


def _is_served(
    weights: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None, format: str | None
) -> bool:
    """Whether our plugin serves a scheme, and does not refuse it: see its `config`"""
    if weights is None or inputs is None:
        return True
    parsed = QuantizationArgs(**weights), QuantizationArgs(**inputs)
    if not is_integer(*parsed) or suits_int8_product(*parsed):
        return True
    return parsed[1].num_bits == 8 and format != CompressionFormat.pack_quantized


def _bits(args: Mapping[str, Any] | None) -> int:
    return 16 if args is None else args["num_bits"]


def _number_type(args: Mapping[str, Any] | None) -> str:
    if args is None:
        return "int16"
    if args["type"] == "int":
        return f"int{args['num_bits']}"
    if args["num_bits"] == 4:
        return "mxfp4" if args.get("group_size") == 32 else "nvfp4"
    return f"fp{args['num_bits']}"


def _has_experts(transforms: CATTransformConfig) -> bool:
    names = [name for _, args in transforms.inputs() for name in args.targets]
    return any(".experts." in name for name in names)


def _products(kinds: list[tuple[int, int, str]], has_experts: bool) -> list[tuple[str, str]]:
    """What runs where; as the support matrix of the README"""
    are_integers = all(a <= 8 and number.startswith("int") for _, a, number in kinds)
    if has_experts and not are_integers:
        return [("any", "nothing in vLLM, since inputs of experts are transformed")]
    if has_experts:
        return [
            ("x86 CPU", "exact int8 products"),
            ("NVIDIA GPU", "refused, since inputs of experts are transformed"),
        ]
    if any(number.endswith("fp4") for *_, number in kinds):
        return [
            ("NVIDIA Blackwell", "4-bit floating-point products (untested)"),
            (
                "NVIDIA, older",
                "what vLLM has in their place, with 16-bit activations (untested)",
            ),
            ("CPU", "nothing in vLLM; emulated in Transformers"),
        ]
    is_small = any(w < 8 and a <= 8 for w, a, _ in kinds)
    if not is_small:
        is_tested = {kind[:2] for kind in kinds} <= {(8, 8), (4, 16)} and all(
            number.startswith("int") for *_, number in kinds
        )
        note = "" if is_tested else " (untested)"
        return [
            ("x86 CPU", f"vLLM's own kernels{note}"),
            ("NVIDIA GPU", "vLLM's own kernels (untested)"),
        ]
    packed = ", of weights that stay packed in 4 bits" if any(w == 4 for w, *_ in kinds) else ""
    return [
        ("x86 CPU", f"exact int8 products{packed}"),
        ("NVIDIA Ampere to Hopper", "exact int8 products, weights as bytes (untested)"),
        ("NVIDIA Blackwell", "refused: quantize to NVFP4 or MXFP4"),
    ]
