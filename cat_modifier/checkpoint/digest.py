# SPDX-License-Identifier: Apache-2.0
"""Digests of transforms and of the config: a reader notices what is damaged or exchanged."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["changed_fields", "config_digests", "tensor_digest", "write_digests"]

_FIELDS = (
    "config_groups",
    "format",
    "ignore",
    "kv_cache_scheme",
    "quant_method",
    "quantization_status",
    "sparsity_config",
    "transform_config",
)
"""Fields of a `quantization_config` that decide what is computed; readers add others"""


def tensor_digest(tensor: Tensor) -> str:
    """
    Compute the SHA-256 of a tensor's elements, as a safetensors file holds them.

    :param tensor: any shape and dtype, on any device
    :return: 64 hexadecimal digits
    """
    elements = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(elements.numpy().tobytes()).hexdigest()


def config_digests(quantization_config: Mapping[str, Any]) -> dict[str, str]:
    """
    Compute the SHA-256 of the fields of a config: of compact JSON in ASCII, with sorted keys,
    without what is null or empty, and with whole numbers as integers.

    :param quantization_config: object of this name in ``config.json``; its digests of fields
        are left out
    :return: 64 hexadecimal digits by the name of the field
    """
    digests = {}
    for name in _FIELDS:
        value = quantization_config.get(name)
        if name == "transform_config" and value:
            value = {key: part for key, part in value.items() if key != "sha256"}
        if (value := _canonical(value)) is not None:
            text = json.dumps(value, sort_keys=True, separators=(",", ":"))
            digests[name] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def changed_fields(
    quantization_config: Mapping[str, Any], digests: Mapping[str, str]
) -> list[str]:
    """
    Find the fields that are not those that were saved.

    :param digests: result of :func:`config_digests` when the config was saved
    """
    found = config_digests(quantization_config)
    return [name for name in _FIELDS if found.get(name) != digests.get(name)]


def write_digests(transform_config: dict[str, Any], transforms: Mapping[str, Tensor]):
    """
    Write the digest of each stored transform into a ``transform_config``.

    :param transform_config: config of the transforms in ``config.json``; changed in place
    :param transforms: stored blocks by the name of the Linear that holds them
    """
    for scheme in transform_config["config_groups"].values():
        if scheme["block_size"] is not None:
            for entry in scheme["apply"]:
                entry["sha256"] = tensor_digest(transforms[entry["targets"][0]])


def _canonical(value: Any) -> Any:
    """
    Leave out nulls and empty values, which libraries add and drop, and write whole numbers as
    integers, as some libraries do; None if nothing is left.
    """
    if isinstance(value, dict):
        value = {key: _canonical(part) for key, part in value.items()}
        value = {key: part for key, part in value.items() if part is not None}
    elif isinstance(value, list):
        value = [_canonical(part) for part in value]
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value in ({}, []) else value
