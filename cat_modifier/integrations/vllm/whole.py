# SPDX-License-Identifier: Apache-2.0
"""
Weight loaders that refuse weights that are larger than the layer that config.json makes.

vLLM cuts a tensor to the rows and columns that its layer has room for, and says nothing.
Linears that this package does not compute keep vLLM's loaders.
"""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from cat_modifier.integrations.vllm.compat import LinearBase, QKVParallelLinear

__all__ = ["adapt_loader", "whole_experts", "whole_weights"]


def adapt_loader(layer: Any, load: Callable, adapt: Callable[..., Tensor]) -> Callable:
    """
    Wrap a weight loader.

    :param layer: the layer of the loader
    :param load: ``load(param, loaded_weight, ...)``
    :param adapt: ``adapt(layer, param, loaded_weight, ...)`` returns what ``load`` gets. Must
        not hold the layer
    :return: method of the layer. vLLM finds the layer of a method, and lets go of it, so that
        the memory of a model can be freed; it does not find a layer that a function holds
    """
    is_method = isinstance(load, MethodType) and load.__self__ is layer

    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        return load(*args, **kwargs)

    function: Callable = load.__func__ if is_method else call  # type: ignore[attr-defined]
    if is_method:
        del load, call  # a function keeps what it names

    @wraps(function)
    def load_adapted(
        layer: Any, param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        loaded_weight = adapt(layer, param, loaded_weight, *args, **kwargs)
        return function(layer, param, loaded_weight, *args, **kwargs)

    return MethodType(load_adapted, layer)


def whole_weights(layer: Any, load: Callable) -> Callable:
    """
    Make a loader that refuses what the layer has no room for.

    :param layer: a Linear, or another layer, whose loader is returned as it is
    :param load: loader of a parameter of the layer
    :return: loader that raises ValueError
    """
    return adapt_loader(layer, load, _check_linear) if isinstance(layer, LinearBase) else load


def _check_linear(
    layer: Any, param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    part = args[0] if args else kwargs.get("loaded_shard_id")
    outputs = _channels(param, loaded_weight, "output_dim")
    _check(layer.prefix, outputs, "output", _output_channels(layer, part))
    inputs = _channels(param, loaded_weight, "input_dim")
    _check(layer.prefix, inputs, "input", layer.input_size)
    return loaded_weight


def whole_experts(
    layer: Any, prefix: str, load: Callable, outputs: int, inputs: int, pack_factor: int
) -> Callable:
    """
    Make a loader that refuses what an expert has no room for.

    :param layer: experts of a layer
    :param prefix: their name, for errors
    :param load: loader of a weight of all of them
    :param outputs: output channels of one projection, on all ranks
    :param inputs: its input channels, on all ranks
    :param pack_factor: weights that a number of the tensor holds
    :return: loader that raises ValueError
    """

    def check(
        layer: Any, param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        _check(prefix, loaded_weight.shape[-2], "output", outputs)
        _check(prefix, loaded_weight.shape[-1] * pack_factor, "input", inputs)
        return loaded_weight

    return adapt_loader(layer, load, check)


def _check(prefix: str, found: int, kind: str, channels: int):
    if found > channels:
        raise ValueError(
            f"{prefix}: the checkpoint has {found} {kind} channels where the model of "
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

    :param part: vLLM's ``loaded_shard_id``; None for the whole layer
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
