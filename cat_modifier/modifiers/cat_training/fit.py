# SPDX-License-Identifier: Apache-2.0
"""Gradient descent on the corrections of one layer"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from cat_modifier.modifiers.cat_training.layer import LayerTensors, TrainableLayer

__all__ = ["Sample", "Training", "call_layer", "fit"]

_EVALUATIONS = 10


@dataclass
class Sample:
    """
    What a layer is called with, and what it should return.

    :param args: positional arguments of the layer; the first are hidden states, if there is any
    :param kwargs: arguments by name
    :param hidden: hidden states, to be passed in place of those; shape (batch, tokens, d)
    :param target: shape (batch, tokens, d)
    :param mask: tokens which are no padding, shape (batch, tokens), bool; None for all
    """

    args: tuple
    kwargs: dict[str, Any]
    hidden: Tensor
    target: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Training:
    """
    :param corrections: corrections of least error on held-out samples, by the first Linear of
        the input
    :param before: error without corrections, relative to the energy of each token
    :param after: error with corrections
    :param steps: number of steps
    """

    corrections: dict[str, Tensor]
    before: float
    after: float
    steps: int


def call_layer(layer: Callable, sample: Sample) -> Tensor:
    """Hidden states after the layer"""
    if sample.args:
        output = layer(sample.hidden, *sample.args[1:], **sample.kwargs)
    else:
        output = layer(**(sample.kwargs | {"hidden_states": sample.hidden}))
    return output[0] if isinstance(output, tuple) else output


def fit(
    layer: TrainableLayer,
    samples: list[Sample],
    held_out: list[Sample],
    steps: int,
    batch_size: int,
    learning_rate: float,
    patience: int,
    on_step: Callable[[], Any] = lambda: None,
) -> Training:
    """
    :param samples: to train on, in an order which is always the same
    :param held_out: to choose the corrections by
    :param steps: at most
    :param batch_size: samples of a step
    :param learning_rate: learning rate of Adam; decays to 0 as a cosine
    :param patience: evaluations without progress, of at most ten, after which to stop
    :param on_step: is called after each step
    :raises ValueError: if the error of the layer is not finite before the first step
    """
    corrections = {name: one.requires_grad_() for name, one in layer.identity().items()}
    optimizer = torch.optim.Adam(corrections.values(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = _batches(samples, batch_size)
    interval = math.ceil(steps / _EVALUATIONS)

    ratios = _range_ratios(layer, corrections)
    before = best_error = _held_out_error(layer, corrections, ratios, held_out)
    if not math.isfinite(before):
        raise ValueError(
            f"The output of {layer.name} is not finite when it is quantized: look for "
            "infinities in the calibration data, or in the weights of the model"
        )
    best = _copy(corrections)
    made = without_progress = 0
    while made < steps and without_progress < patience:
        _add_gradients(layer, corrections, ratios, next(batches))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        made += 1
        on_step()
        if made % interval and made < steps:
            continue
        # the search for ranges takes longer than a step: they stay for some steps
        ratios = _range_ratios(layer, corrections)
        error = _held_out_error(layer, corrections, ratios, held_out)
        if not math.isfinite(error):
            break
        without_progress += 1
        if error < best_error:
            best, best_error, without_progress = _copy(corrections), error, 0
    return Training(best, before, best_error, made)


def _batches(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    """Without end, each sample once before any comes again"""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += torch.randperm(len(samples), generator=generator).tolist()
        yield [samples[index] for index in order[:size]]
        del order[:size]


def _copy(corrections: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in corrections.items()}


@torch.no_grad()
def _range_ratios(layer: TrainableLayer, corrections: dict[str, Tensor]) -> dict[str, Tensor]:
    return layer.range_ratios(layer.correct(corrections))


def _error(output: Tensor, sample: Sample) -> Tensor:
    """Of each token relative to its energy, mean over tokens"""
    target = sample.target.float()
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    relative = (output.float() - target).square().sum(-1) / energy
    return relative.mean() if sample.mask is None else relative[sample.mask].mean()


@torch.no_grad()
def _held_out_error(
    layer: TrainableLayer,
    corrections: dict[str, Tensor],
    ratios: dict[str, Tensor],
    samples: list[Sample],
) -> float:
    tensors = layer.quantize(layer.correct(corrections), ratios)
    with layer.computing_with(tensors) as module:
        errors = [_error(call_layer(module, sample), sample) for sample in samples]
    return torch.stack(errors).mean().item()


def _add_gradients(
    layer: TrainableLayer,
    corrections: dict[str, Tensor],
    ratios: dict[str, Tensor],
    batch: list[Sample],
):
    """
    Weights are transformed and quantized once for all samples: gradients are summed there,
    and go from there to the corrections.
    """
    tensors = layer.quantize(layer.correct(corrections), ratios)
    leaves = LayerTensors(
        *(
            {
                name: one.detach().requires_grad_(one.requires_grad)
                for name, one in getattr(tensors, field.name).items()
            }
            for field in fields(tensors)
        )
    )
    # gradients of a mean over tokens, each relative to the energy of d values: in 16 bits they
    # would vanish
    scale = batch[0].target.numel()
    for sample in batch:
        with layer.computing_with(leaves) as module:
            (_error(call_layer(module, sample), sample) * scale / len(batch)).backward()
    outputs, gradients = [], []
    for field in fields(tensors):
        for name, leaf in getattr(leaves, field.name).items():
            if leaf.grad is not None:  # as of experts which no token chose
                outputs.append(getattr(tensors, field.name)[name])
                gradients.append(leaf.grad / scale)
    torch.autograd.backward(outputs, gradients)
