# SPDX-License-Identifier: Apache-2.0
"""Gradient descent on corrections, which keeps those of least error on held-out data."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Training", "descend", "draw_batches"]

_EVALUATIONS = 10
"""Number of evaluations of the held-out error"""


@dataclass(frozen=True)
class Training:
    """
    Result of a training.

    :param corrections: corrections of least error on held-out samples, by the first Linear of
        the input
    :param before: held-out error without corrections
    :param after: held-out error with corrections
    :param steps: number of steps made
    """

    corrections: dict[str, Tensor]
    before: float
    after: float
    steps: int


def descend(
    corrections: Mapping[str, Tensor],
    schedule: LRScheduler,
    evaluate: Callable[[], float],
    add_gradients: Callable[[], Any],
    steps: int,
    patience: int,
    on_step: Callable[[], Any],
    name: str,
) -> Training:
    """
    Take steps until the held-out error decreases no more, or gradients are not finite.

    :param corrections: corrections to train, by the first Linear of the input
    :param schedule: learning rate of the optimizer of the corrections
    :param evaluate: computes the held-out error
    :param add_gradients: adds the gradients of a batch to the corrections
    :param steps: upper bound of the number of steps
    :param patience: number of evaluations without progress before training stops, of ten
    :param on_step: called after each step
    :param name: name of the layer or model, for messages
    :raises ValueError: if the error is not finite before the first step
    """
    optimizer, interval = schedule.optimizer, math.ceil(steps / _EVALUATIONS)
    before = best_error = evaluate()
    if not math.isfinite(before):
        raise ValueError(
            f"The output of {name} is not finite when it is quantized: look for infinities in "
            "the calibration data, or in the weights of the model"
        )
    best = _copy(corrections)
    made = without_progress = 0
    while made < steps and without_progress < patience:
        add_gradients()
        if not _gradients_are_finite(corrections):
            _warn(name, "its gradients are", made)
            break
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        made += 1
        on_step()
        if made % interval and made < steps:
            continue
        error = evaluate()
        if not math.isfinite(error):
            _warn(name, "its output is", made)
            break
        without_progress += 1
        if error < best_error:
            best, best_error, without_progress = _copy(corrections), error, 0
    return Training(best, before, best_error, made)


def _gradients_are_finite(corrections: Mapping[str, Tensor]) -> bool:
    gradients = [one.grad for one in corrections.values() if one.grad is not None]
    # one answer for all: to ask a GPU for each would take longer
    return not gradients or bool(torch.stack([one.isfinite().all() for one in gradients]).all())


def _warn(name: str, what: str, steps: int):
    logger.warning(
        f"Training of {name} ends after {steps} steps, because {what} not finite. The best "
        "transforms until then are kept. Try a smaller `learning_rate`"
    )


def _copy(corrections: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in corrections.items()}


def draw_batches(samples: list, size: int) -> Iterator[list]:
    """
    Draw batches forever, in the same order in every run. Each sample is drawn once before any
    sample is drawn again.
    """
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += torch.randperm(len(samples), generator=generator).tolist()
        yield [samples[index] for index in order[:size]]
        del order[:size]
