# SPDX-License-Identifier: Apache-2.0
"""
Find tensors of quantized weights that a checkpoint lacks.

vLLM leaves a parameter without a tensor as it was made, and says nothing. Parameters are
therefore made with values that no checkpoint has.
"""

import torch
from torch import Tensor

from cat_modifier.integrations.vllm.compat import get_current_vllm_config_or_none

__all__ = ["check_loaded", "check_scales", "fill_unloaded"]

_BYTE = 0x5B
"""Every byte of integers that are not loaded. No row of a weight has only such codes"""


def fill_unloaded(tensor: Tensor) -> Tensor:
    """
    Fill a tensor with values that mean it is not loaded.

    :param tensor: integers, or floats
    :return: the tensor
    """
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(_pattern(tensor))


def check_loaded(prefix: str, weight_name: str, weight: Tensor, scale: Tensor):
    """
    Check the tensors of a quantized weight.

    :param prefix: name of the layer, for errors
    :param weight_name: name of the weight's tensor, for errors
    :param weight: integers, shape (..., rows, columns)
    :param scale: scales of the rows, shape (..., rows, 1)
    :raises ValueError: if a part was not loaded, or a scale is not positive and finite
    """
    # a weight reload keeps what its checkpoint lacks
    if weight.is_meta or scale.is_meta or _is_dummy():
        return
    if (weight == _pattern(weight)).all(-1).any():
        raise ValueError(
            f"{prefix}: `{weight_name}`, or its part of a merged layer, is missing from the "
            "checkpoint: it is damaged. Copy or download it again"
        )
    check_scales(prefix, scale)


def check_scales(prefix: str, scale: Tensor):
    """
    Check the scales of a quantized weight.

    :param prefix: name of the layer, for errors
    :param scale: scales, any shape, floating point
    :raises ValueError: if one is not positive and finite
    """
    if scale.is_meta or _is_dummy():
        return
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"{prefix}: `weight_scale` is missing from the checkpoint, or holds values that "
            "are not positive and finite: the checkpoint is damaged. Copy or download it again"
        )


def _pattern(tensor: Tensor) -> int:
    return int.from_bytes(bytes([_BYTE]) * tensor.element_size(), "little")


def _is_dummy() -> bool:
    """Whether vLLM makes random weights up, negative scales among them"""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"
