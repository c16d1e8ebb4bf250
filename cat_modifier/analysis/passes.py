# SPDX-License-Identifier: Apache-2.0
"""Passes over the data, with progress, which can be interrupted and resumed"""

import inspect
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
import tqdm
from compressed_tensors.utils import get_execution_device
from torch import Tensor
from torch.nn import Linear, Module

from cat_modifier.analysis.workspace import Workspace
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.calibration.collector import InputCollector, StatisticsType

__all__ = ["Batch", "calibrate", "call", "hooked", "resumable", "without_predictions"]

Batch = Tensor | Mapping[str, Any]
"""Token ids (or whatever the model takes first), or keyword arguments of the model"""


def call(model: Module, batch: Batch) -> Any:
    """The model's output for a batch, which may be on another device"""
    device = get_execution_device(model)
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()})
    return model(batch.to(device))


def without_predictions(model: Module, ids: Tensor) -> Batch:
    """
    Token ids as a batch for a causal language model whose logits nobody asks for: most can
    leave them out, and save a fifth of the work on a small model.
    """
    batch = {"input_ids": ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = 1
    return batch


@contextmanager
def hooked(hooks: Mapping[Module, Callable]) -> Iterator[None]:
    """Context in which modules have a forward hook each"""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def resumable(
    batches: Sequence[Batch],
    description: str,
    workspace: Workspace | None,
    state_dict: Callable[[], dict[str, Any]],
    load_state_dict: Callable[[dict[str, Any]], None],
) -> Generator[tuple[int, Batch], None, None]:
    """
    The batches which are left of a pass, numbered, with a progress bar. Between two batches
    the state of the pass is saved from time to time, and when it is interrupted. Signals are
    held back meanwhile: close the generator if the loop may raise.

    :param workspace: where; None to keep nothing
    """
    state = workspace.load_state() if workspace is not None else None
    done = 0
    if state is not None:
        done = state["batches"]
        load_state_dict(state["pass"])
    interrupts = _DeferredInterrupts() if workspace is not None else nullcontext()
    with interrupts, tqdm.tqdm(total=len(batches), initial=done, desc=description) as progress:
        for index in range(done, len(batches)):
            yield index, batches[index]
            progress.update()
            if workspace is not None:
                workspace.save_state(
                    lambda done=index + 1: {"batches": done, "pass": state_dict()},
                    now=interrupts.signal is not None or index + 1 == len(batches),
                )
                interrupts.raise_deferred()


class _DeferredInterrupts:
    """
    Context in which the first SIGINT or SIGTERM is kept until it is asked for: within a
    batch, some statistics have seen it and others not, and the state is not worth saving.
    """

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "_DeferredInterrupts":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._defer)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _defer(self, number: int, frame: object):
        if self.signal is not None:  # a second one means it
            self._raise(number)
        self.signal = number

    def raise_deferred(self):
        if self.signal is not None:
            self._raise(self.signal)

    def _raise(self, number: int):
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


@torch.no_grad()
def calibrate(
    model: Module,
    linears: Mapping[str, Linear],
    batches: Sequence[Batch],
    new_statistics: Callable[[SharedInput], StatisticsType],
    workspace: Workspace | None = None,
) -> InputCollector[StatisticsType]:
    """
    Pass batches through a model, and take statistics of the inputs of Linears.

    :param linears: by full name
    :param new_statistics: makes what accumulates the statistics of an input
    """
    calibration = InputCollector(linears, new_statistics)
    current = 0

    def observe(name: str) -> Callable:
        return lambda module, args, output: calibration.observe(name, args[0], current)

    with hooked({linear: observe(name) for name, linear in linears.items()}):
        states = calibration.state_dict, calibration.load_state_dict
        with closing(resumable(batches, "Calibrating", workspace, *states)) as remaining:
            for index, batch in remaining:
                current = index
                if isinstance(batch, Mapping):
                    calibration.set_attention_mask(index, batch.get("attention_mask"))
                call(model, batch)
    return calibration
