# SPDX-License-Identifier: Apache-2.0
"""The hooks that watch a model while calibration data pass through it."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

from torch.nn import Linear, Module

from cat_modifier.calibration.collector import InputCollector, InputStatistics
from cat_modifier.calibration.padding import PaddingMasks
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.modifiers.cat.distributed import gather
from cat_modifier.modifiers.cat.weighted_tokens import WeightedTokens

__all__ = ["CalibrationHooks"]


class CalibrationHooks:
    """
    Collects statistics of the inputs of Linears, and notes which modules run.

    :param model: the whole model
    :param linears: targeted Linears by full name
    :param new_statistics: makes the empty statistics of an input
    :param weighted: weights the tokens that attention reads

    Attributes:
        collector: the statistics
    """

    def __init__(
        self,
        model: Module,
        linears: Mapping[str, Linear],
        new_statistics: Callable[[SharedInput], InputStatistics],
        weighted: WeightedTokens,
    ):
        self._model, self._linears, self._weighted = model, linears, weighted
        self.collector = InputCollector(linears, new_statistics, PaddingMasks(model))
        self._ran: set[str] = set()

    def register(self, register_hook: Callable, batch: Callable[[], int]):
        """
        Hook the Linears, and the modules that hold them.

        :param register_hook: the method of a modifier
        :param batch: returns the index of the batch that passes
        """
        names = {linear: name for name, linear in self._linears.items()}
        for name, module in self._model.named_modules():
            if module in names:
                hook = partial(self._on_linear, name, batch)
                register_hook(module, hook, "forward_pre")
            elif any(child in names for child in module.modules()):
                hook = partial(self._on_module, name, batch)
                register_hook(module, hook, "forward_pre", with_kwargs=True)

    def _on_linear(self, name: str, batch: Callable[[], int], linear: Linear, args: tuple):
        self.collector.count(name, args[0], batch())
        if not self._weighted.covers(linear):
            self.collector.observe(name, args[0], batch())

    def _on_module(
        self, name: str, batch: Callable[[], int], module: Module, args: tuple, kwargs: dict
    ):
        self._ran.add(name)
        masks, index = self.collector.masks, batch()
        masks.note(name, kwargs, index)
        mask = masks.of(name, index)
        for linear, x, weights in self._weighted.enter(name, module, args, kwargs, index, mask):
            self.collector.observe(linear, x, index, weights)

    def unseen(
        self, transformed: Collection[str]
    ) -> tuple[list[SharedInput], list[SharedInput]]:
        """
        List the inputs that have no transform yet; each Linear that was not called is one. A
        collective call.

        :param transformed: names of the Linears with transformed inputs
        :return: inputs of Linears that were not called while the modules which hold them ran,
            on any rank: their weights are read in another way. And all others
        """
        observer = self.collector.observer
        inputs = [one for one in observer.inputs if one.first not in transformed]
        known = {name for one in inputs for name in one.linears}.union(transformed)
        inputs += [
            SharedInput({name: one}) for name, one in self._linears.items() if name not in known
        ]
        # tracing replaces the calls of modules by those of the modules inside
        called = set().union(*gather(observer.called))
        ran = {_holder(name) for name in called}.union(*gather(self._ran))
        bypassed: list[SharedInput] = []
        others: list[SharedInput] = []
        for one in inputs:
            was_called = not called.isdisjoint(one.linears)
            holder_ran = not ran.isdisjoint(map(_holder, one.linears))
            (bypassed if holder_ran and not was_called else others).append(one)
        return bypassed, others


def _holder(name: str) -> str:
    return name.rpartition(".")[0]
