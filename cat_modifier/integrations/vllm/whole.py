# SPDX-License-Identifier: Apache-2.0
"""
Refuse weights that are larger than the layer that config.json makes.

vLLM cuts a tensor to the rows and columns that its layer has room for, and says nothing.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from cat_modifier.integrations.vllm.compat import LinearBase, QKVParallelLinear

__all__ = ["whole_experts", "whole_weights"]


def whole_weights(layer: Any, load: Callable) -> Callable:
    """
    Make a loader that refuses what the layer has no room for.

    :param layer: a Linear, or another layer, whose loader is returned as it is
    :param load: loader of a parameter of the layer
    :return: loader that raises ValueError
    """
    if not isinstance(layer, LinearBase):
        return load

    @wraps(load)
    def load_whole(param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any):
        part = args[0] if args else kwargs.get("loaded_shard_id")
        room = {"output_dim": _output_channels(layer, part), "input_dim": layer.input_size}
        for attribute, channels in room.items():
            _check(layer.prefix, _channels(param, loaded_weight, attribute), channels)
        return load(param, loaded_weight, *args, **kwargs)

    return load_whole


def whole_experts(prefix: str, load: Callable, shape: tuple[int, int]) -> Callable:
    """
    Make a loader that refuses what an expert has no room for.

    :param prefix: name of the experts, for errors
    :param load: loader of a parameter of all experts of a layer
    :param shape: shape that one projection has in the checkpoint, on all ranks
    :return: loader that raises ValueError
    """

    @wraps(load)
    def load_whole(param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any):
        for found, channels in zip(loaded_weight.shape[-2:], shape, strict=True):
            _check(prefix, found, channels)
        return load(param, loaded_weight, *args, **kwargs)

    return load_whole


def _check(prefix: str, found: int, channels: int):
    if found > channels:
        raise ValueError(
            f"{prefix}: the checkpoint has {found} rows or columns where the model of "
            f"config.json has {channels}: config.json is not that of the checkpoint"
        )


def _channels(param: Parameter, loaded_weight: Tensor, attribute: str) -> int:
    """Count the channels of a tensor; groups of channels are counted as one"""
    dim = getattr(param, attribute, None)
    if dim is None or dim >= loaded_weight.ndim:
        return 0
    factor = getattr(param, "packed_factor", 1)
    is_packed = getattr(param, "packed_dim", None) == dim
    return int(loaded_weight.shape[dim] * (factor if is_packed else 1))


def _output_channels(layer: Any, part: Any) -> int:
    """
    Count the channels that a part of a merged layer has on all ranks.

    :param part: what vLLM calls ``loaded_shard_id``; None for the whole layer
    """
    sizes = getattr(layer, "output_sizes", [layer.output_size])
    if isinstance(layer, QKVParallelLinear):
        # output_sizes repeats heads that several ranks hold
        keys, values = (
            layer.total_num_kv_heads * size for size in (layer.head_size, layer.v_head_size)
        )
        named = {"q": layer.total_num_heads * layer.head_size, "k": keys, "v": values}
        return named.get(part, sum(sizes))
    if part is None:
        return sum(sizes)
    return sum(sizes[index] for index in (part if isinstance(part, tuple) else (part,)))
