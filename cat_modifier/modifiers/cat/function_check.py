# SPDX-License-Identifier: Apache-2.0
"""
Comparison of the outputs of modules before and after their Linears are transformed.

A transform keeps the function of a model only if the model calls its Linears. Some code reads
the weight of a Linear and multiplies by it directly. It then multiplies the original input by
the transformed weight. No attribute of a module shows this, so each module runs again on one
batch.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import Tensor
from torch.nn import Linear, Module, ModuleDict, ModuleList
from torch.utils._pytree import tree_leaves

from cat_modifier.calibration.attention import without_caches
from cat_modifier.calibration.padding import real_tokens
from cat_modifier.modifiers.cat.distributed import gather
from cat_modifier.modifiers.forward import as_it_is_run

__all__ = ["FunctionCheck", "relative_change"]

_TOLERANCE = 0.2
"""Bound of the relative change. Weights used without calling their Linear change outputs by
0.4 or more, rounding to 16 bits changes them by less than 0.05"""

_TOKENS = 256
"""Number of tokens of each output to compare"""


class _Call(NamedTuple):
    args: tuple
    kwargs: dict[str, Any]
    mask: Tensor | None


class FunctionCheck:
    """
    Remembers the first call of each decoding layer, and repeats it.

    Linears outside decoding layers are checked with the module that holds them.

    :param model: the whole model
    :param linears: Linears to be transformed, by full name
    :param layers: decoding layers by full name
    """

    def __init__(
        self, model: Module, linears: Mapping[str, Linear], layers: Mapping[str, Module]
    ):
        self._model = model
        self._modules: dict[str, Module] = {}
        self._module_of: dict[str, str] = {}
        for name in linears:
            holder = next((one for one in layers if name.startswith(f"{one}.")), None)
            if holder is None:
                holder = _holder(model, name)
            self._module_of[name] = holder
            self._modules[holder] = model.get_submodule(holder)
        self._calls: dict[str, _Call] = {}

    def watch(self, register: Callable, find_mask: Callable[[str], Tensor | None]):
        """
        Remember the first call of each module, until :meth:`compare` forgets it.

        :param register: `register_hook` of a modifier
        :param find_mask: finds the real tokens of a module that is called, shape (batch,
            tokens), bool. Attention may return zeros for padding, whatever its Linears do
        """
        for name, module in self._modules.items():

            def remember(module: Module, args: tuple, kwargs: dict, name: str = name):
                if name not in self._calls:
                    self._calls[name] = _Call(args, kwargs, find_mask(name))

            register(module, remember, "forward_pre", with_kwargs=True)

    def outputs(self, linears: Iterable[str]) -> dict[str, list[Tensor]]:
        """
        Run the modules that hold some Linears, with the arguments of their first calls.

        :return: tokens of each floating point output, shape (tokens, ...), by the name of
            the module, in the order of the Linears. Modules never called are left out
        """
        names = dict.fromkeys(self._module_of[name] for name in linears)
        return {name: self._run(name) for name in names if name in self._calls}

    def compare(self, before: Mapping[str, list[Tensor]], transformed: Collection[str]):
        """
        Run modules again, and forget their calls.

        :param before: result of :meth:`outputs` before Linears were transformed
        :param transformed: names of the transformed Linears
        :raises ValueError: if the output of a module changed, on any rank
        """
        changes = {}
        for name, expected in before.items():
            x = _tokens_of(self._calls[name])
            pairs = zip(expected, self._run(name), strict=True)
            del self._calls[name]
            changes[name] = max((relative_change(*pair, x) for pair in pairs), default=0.0)
        of_ranks = gather(changes)
        for name in dict.fromkeys(name for one in of_ranks for name in one):
            change = max(one.get(name, 0.0) for one in of_ranks)
            if change > _TOLERANCE:
                inside = [one for one in transformed if self._module_of[one] == name]
                raise ValueError(
                    f"The output of {name} changes by {change:.0%} when the inputs of its "
                    f"Linears are transformed ({', '.join(inside)}): it seems to use a "
                    "weight without calling the Linear. Add that Linear to `ignore` of "
                    f"CATModifier, or all of them: `re:{name}.*`"
                )

    def _run(self, name: str) -> list[Tensor]:
        call = self._calls[name]
        args, kwargs = without_caches(call.args, call.kwargs)
        devices = range(torch.cuda.device_count())
        with (
            HooksMixin.disable_hooks(),
            as_it_is_run(self._model),
            torch.random.fork_rng(devices),
        ):
            torch.manual_seed(0)
            outputs = self._modules[name](*args, **kwargs)
        return [_some_tokens(one, call.mask) for one in _floats(outputs)]


def relative_change(before: Tensor, after: Tensor, x: Tensor | None = None) -> float:
    """
    Compute the change of an output, relative to the module's contribution: the output, or
    the output less the input if that is smaller (residual connections).

    Median over tokens, because rounding may route a few tokens to other experts.

    :param before: shape (tokens, ...)
    :param after: same shape
    :param x: input of the module; ignored unless it has the same shape
    :return: relative change; 0 within the rounding of the dtype, infinite if finite outputs
        are no longer finite
    """
    eps = torch.finfo(before.dtype).eps
    before, after = before.flatten(1).float(), after.flatten(1).float()
    is_finite = before.isfinite().all(dim=1)
    if not is_finite.any():
        return 0.0
    if not after[is_finite].isfinite().all():
        return float("inf")
    size = before.norm(dim=1)
    scale = size
    if x is not None and x.shape[0] == before.shape[0] and x[0].numel() == before.shape[1]:
        scale = torch.minimum(size, (before - x.flatten(1).float()).norm(dim=1))
    rounding = eps * size
    tiny = torch.finfo(torch.float32).tiny
    change = ((after - before).norm(dim=1) - rounding).clamp_min(0) / scale.clamp_min(tiny)
    return change[is_finite].median().item()


def _holder(model: Module, name: str) -> str:
    """Find the name of the innermost module around a Linear that can be called"""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(model.get_submodule(name), ModuleList | ModuleDict):
            break
    return name


def _floats(tree: Any) -> list[Tensor]:
    return [
        one
        for one in tree_leaves(tree)
        if isinstance(one, Tensor) and one.is_floating_point() and not one.is_meta
    ]


def _some_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Take evenly spaced rows of real tokens, shape (tokens, last size)"""
    rows = real_tokens(x, mask) if x.ndim else x.reshape(1, 1)
    return rows[:: -(-len(rows) // _TOKENS) or 1].clone()


def _tokens_of(call: _Call) -> Tensor | None:
    """Tokens of a module's first floating point input"""
    inputs = _floats([call.args, call.kwargs])
    return _some_tokens(inputs[0], call.mask) if inputs else None
