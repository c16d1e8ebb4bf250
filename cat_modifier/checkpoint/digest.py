# SPDX-License-Identifier: Apache-2.0
"""Digests of stored transforms: a reader notices tensors that are damaged or exchanged."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["tensor_digest", "write_digests"]


def tensor_digest(tensor: Tensor) -> str:
    """
    Compute the SHA-256 of a tensor's elements, as a safetensors file holds them.

    :param tensor: any shape and dtype, on any device
    :return: 64 hexadecimal digits
    """
    elements = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(elements.numpy().tobytes()).hexdigest()


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
