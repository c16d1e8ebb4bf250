# SPDX-License-Identifier: Apache-2.0
"""
Value projections of attention, found by observing the forward pass.

Attention averages the values of tokens, head by head. A matrix that multiplies the values of
a head therefore multiplies its outputs, whatever the scores are. So a transform before o_proj
can be fused into the rows of v_proj (and its bias), and costs nothing online.

Some attention differs: gates on the output and norms on the values do not commute with a
matrix. So names prove nothing. Instead, the output of each Linear is multiplied by a matrix
per head, and the inputs of the other Linears are compared.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from compressed_tensors.modeling.kvcache import QuantizedKVCache
from compressed_tensors.utils import get_execution_device
from loguru import logger
from torch import Tensor
from torch.nn import Linear, Module
from transformers import Cache

from cat_modifier.calibration.padding import real_tokens
from cat_modifier.functional.transform import apply_blocks

__all__ = ["ValueProjection", "find_value_projections"]

_TOLERANCE = 0.02
"""Bound of the relative error, mean over tokens. Rounding to 16 bits stays below"""

_TOLERANCE_OF_ALL = 0.2
"""Bound of the relative error of the model's last input, mean over tokens"""

_TOKENS = 1024
"""Number of tokens to compare"""

_MAX_RUNS = 16
"""Number of runs to find layers that share values. Layers not tested by then count as
sharing values"""


@dataclass(frozen=True)
class ValueProjection:
    """
    The Linear that computes the values of an attention module.

    :param linear: full name of the Linear
    :param head_dim: channels of a head
    :param repeats: number of neighbouring heads of the attention output that share one
        value head
    """

    linear: str
    head_dim: int
    repeats: int


def find_value_projections(
    model: Module,
    linears: Mapping[str, Linear],
    run: Callable[[], None],
    mask: Tensor | None = None,
) -> dict[str, ValueProjection]:
    """
    Find the value projection of each output projection.

    :param linears: Linears that may be changed, by full name
    :param run: passes some data through the model. Modules with a `head_dim`, such as
        Transformers' attention, run again on the same inputs
    :param mask: real tokens of that data, shape (batch, tokens), bool; None for all. Attention
        may return zeros for padding, which no Linear changes
    :return: value projections by the name of the output projection
    """
    siblings: dict[str, dict[str, Linear]] = {}
    for name, linear in linears.items():
        siblings.setdefault(name.rpartition(".")[0], {})[name] = linear
    found: dict[str, ValueProjection] = {}
    hooks = {}
    for name, members in siblings.items():
        module = model.get_submodule(name)
        head_dim = getattr(module, "head_dim", None)
        if isinstance(head_dim, int) and len(members) > 1:
            hooks[module] = _Probe(members, head_dim, mask, found)
    with _hooks() as handles:
        for module, hook in hooks.items():
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        if hooks:
            run()
    readers = Counter(projection.linear for projection in found.values())
    alone = {name: one for name, one in found.items() if readers[one.linear] == 1}
    kept = _read_by_nothing_else(linears, alone, run, mask) if alone else {}
    if shared := [name for name in found if name not in kept]:
        logger.warning(
            "The values of attention are read by more than its output projection (layers may "
            "share them). Transforms before these output projections run online instead of "
            f"being fused into v_proj: {', '.join(shared)}"
        )
    return kept


def _read_by_nothing_else(
    linears: Mapping[str, Linear],
    found: Mapping[str, ValueProjection],
    run: Callable[[], None],
    mask: Tensor | None,
) -> dict[str, ValueProjection]:
    """
    Keep projections with no other reader: multiplying v_proj's output, and undoing it before
    o_proj, leaves the model unchanged.

    All are tested together. A set that changes the model is halved and tested again, so that
    a few layers that share values cost few runs.
    """

    def last_input(found: Mapping[str, ValueProjection]) -> Tensor:
        last = {}

        def remember(linear: Linear, inputs: tuple):
            last["input"] = inputs[0]

        with torch.no_grad(), _hooks() as handles:
            for name, projection in found.items():
                value = linears[projection.linear]
                matrices = _matrices(value, projection.head_dim)
                back = torch.linalg.inv(matrices).repeat_interleave(projection.repeats, 0)
                handles.append(value.register_forward_hook(_multiply_output(matrices)))
                handles.append(linears[name].register_forward_pre_hook(_multiply_input(back)))
            for linear in linears.values():
                handles.append(linear.register_forward_pre_hook(remember))
            run()
        return _some_tokens(last["input"], mask)

    expected = last_input({})
    kept: dict[str, ValueProjection] = {}
    untested = [list(found)]
    for _ in range(_MAX_RUNS):
        if not untested:
            break
        names = untested.pop()
        if _error(last_input({n: found[n] for n in names}), expected) < _TOLERANCE_OF_ALL:
            kept |= {name: found[name] for name in names}
        elif len(names) > 1:
            half = len(names) // 2
            untested += [names[:half], names[half:]]
    return {name: found[name] for name in found if name in kept}


def _matrices(linear: Linear, head_dim: int) -> Tensor:
    """
    Make one matrix per head of a Linear's output, shape (heads, head_dim, head_dim).

    Not rotations: norms without weights commute with rotations.
    """
    shape = (linear.out_features // head_dim, head_dim, head_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0.5, 2, head_dim)
    return (torch.linalg.qr(noise)[0] * scales).to(get_execution_device(linear))


def _multiply_output(blocks: Tensor) -> Callable:
    return lambda linear, inputs, x: apply_blocks(x.float(), blocks).to(x.dtype)


def _multiply_input(blocks: Tensor) -> Callable:
    return lambda linear, inputs: (apply_blocks(inputs[0].float(), blocks).to(inputs[0].dtype),)


def _some_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Take evenly spaced real tokens"""
    tokens = real_tokens(x, mask)
    return tokens[:: -(-len(tokens) // _TOKENS) or 1].float()


def _error(x: Tensor, expected: Tensor) -> float:
    """Relative error, mean over tokens that are not zero; infinite if all are"""
    size = expected.norm(dim=-1)
    is_seen = size > 0
    if not is_seen.any():
        return math.inf
    return ((x - expected).norm(dim=-1)[is_seen] / size[is_seen]).mean().item()


class _Probe:
    """
    Forward hook of an attention module.

    Multiplies each Linear's output by a matrix per head, and looks for another Linear whose
    input changes by the same matrices.

    :param linears: Linears of the module, by full name
    :param head_dim: channels of a head
    :param mask: real tokens, see :func:`find_value_projections`
    :param found: receives the value projections, by the name of the output projection
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        head_dim: int,
        mask: Tensor | None,
        found: dict[str, ValueProjection],
    ):
        self.linears, self.head_dim, self.mask, self.found = linears, head_dim, mask, found
        self.is_done = False

    def __call__(self, module: Module, args: tuple, kwargs: dict[str, Any], output: Any):
        if self.is_done:
            return
        self.is_done = True
        try:
            self._probe(module, args, kwargs)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            logger.warning(
                f"{type(module).__name__} cannot be called a second time, so that no transform "
                f"is fused into its v_proj: {error}"
            )

    def _probe(self, module: Module, args: tuple, kwargs: dict[str, Any]):
        args, kwargs = without_caches(args, kwargs)
        run = partial(module, *args, **kwargs)
        before = self._inputs(run)
        for value, linear in self.linears.items():
            if linear.out_features % self.head_dim:
                continue
            matrices = _matrices(linear, self.head_dim)
            after = self._inputs(run, linear, matrices)
            for name in before.keys() & after.keys():
                repeats, rest = divmod(before[name].shape[-1], linear.out_features)
                if rest or name == value:
                    continue
                expected = apply_blocks(before[name], matrices.repeat_interleave(repeats, 0))
                if _error(after[name], expected) < _TOLERANCE:
                    self.found[name] = ValueProjection(value, self.head_dim, repeats)

    def _inputs(
        self,
        run: Callable[[], Any],
        value: Linear | None = None,
        matrices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Run the module, and read the inputs of its Linears.

        :param value: Linear to multiply the output of; None to change nothing
        :param matrices: one matrix per head of that output
        :return: some tokens of each Linear's input, float32, by full name
        """
        seen: dict[str, Tensor] = {}

        with torch.no_grad(), _hooks() as handles:
            for name, linear in self.linears.items():

                def read(linear: Linear, inputs: tuple, name: str = name):
                    seen[name] = _some_tokens(inputs[0], self.mask)

                handles.append(linear.register_forward_pre_hook(read))
            if value is not None and matrices is not None:
                handles.append(value.register_forward_hook(_multiply_output(matrices)))
            run()
        return seen


@contextmanager
def _hooks() -> Iterator[list]:
    """Yield a list for handles of hooks, and remove these hooks at the end"""
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def without_caches(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Leave out caches, which would be filled twice when a module runs again"""

    def keep(one: Any) -> Any:
        return None if isinstance(one, Cache | QuantizedKVCache) else one

    return tuple(map(keep, args)), {key: keep(one) for key, one in kwargs.items()}
