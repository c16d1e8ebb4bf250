# SPDX-License-Identifier: Apache-2.0
"""Gradient descent on the corrections of one layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cat_modifier.modifiers.cat_training.descent import Training, descend, draw_batches
from cat_modifier.modifiers.cat_training.layer import TrainableLayer

__all__ = ["Sample", "call_layer", "fit"]


@dataclass
class Sample:
    """
    Arguments of one call of a layer, and the expected output.

    :param args: positional arguments. The first one, if any, is the original hidden states
    :param kwargs: keyword arguments
    :param hidden: hidden states of the quantized model, shape (batch, tokens, d). They
        replace the original hidden states
    :param target: expected output, shape (batch, tokens, d)
    :param mask: true for real tokens, false for padding, shape (batch, tokens), bool; None if
        there is no padding
    """

    args: tuple
    kwargs: dict[str, Any]
    hidden: Tensor
    target: Tensor
    mask: Tensor | None


def call_layer(layer: Callable, sample: Sample) -> Tensor:
    """Call a layer with the sample's hidden states, and return its hidden states"""
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
    Train the corrections of a layer.

    :param samples: samples to train on
    :param held_out: samples to choose the corrections by
    :param steps: upper bound of the number of steps
    :param batch_size: samples per step
    :param learning_rate: learning rate of Adam at the start; decays to 0 along a cosine
    :param patience: number of evaluations without progress before training stops, of ten
    :param on_step: called after each step
    :return: corrections, and errors relative to the energy of each token
    :raises ValueError: if the error of the layer is not finite before the first step
    """
    corrections = {name: one.requires_grad_() for name, one in layer.identity().items()}
    optimizer = torch.optim.Adam(corrections.values(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = draw_batches(samples, batch_size)
    ratios: dict[str, Tensor] = {}

    def evaluate() -> float:
        # keep ranges for some steps: to search for them takes longer than a step
        ratios.update(_range_ratios(layer, corrections))
        return _held_out_error(layer, corrections, ratios, held_out)

    def add_gradients():
        _add_gradients(layer, corrections, ratios, next(batches))

    return descend(
        corrections, schedule, evaluate, add_gradients, steps, patience, on_step, layer.name
    )


@torch.no_grad()
def _range_ratios(layer: TrainableLayer, corrections: dict[str, Tensor]) -> dict[str, Tensor]:
    return layer.range_ratios(layer.correct(corrections))


def _error(output: Tensor, sample: Sample) -> Tensor:
    """Compute the squared error of each token over the token's energy, mean over tokens"""
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
    Add the gradients of a batch to the corrections.

    Weights are transformed and quantized once for all samples. Their gradients are summed
    over the samples, and then passed on to the corrections.
    """
    tensors = layer.quantize(layer.correct(corrections), ratios)
    leaves = tensors.leaves()
    # scale up: gradients of a mean over tokens and channels would vanish in 16 bits
    scale = batch[0].target.numel()
    for sample in batch:
        with layer.computing_with(leaves) as module:
            (_error(call_layer(module, sample), sample) * scale / len(batch)).backward()
    tensors.backward(leaves, scale)
