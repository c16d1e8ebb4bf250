# SPDX-License-Identifier: Apache-2.0
"""
Gradient descent on the corrections of all layers, by the logits of the unquantized model.

The quantized model (student) learns to predict what the unquantized model (teacher) predicts:
the loss is the Kullback-Leibler divergence of their next tokens (arXiv 1503.02531), in nats.
The teacher is the same model in memory, whose transforms leave its function as it is.

Memory: the quantized weights and their gradients in the dtype of the model, the float32
copies of one layer, the activations of one layer, and the logits of one batch with their
gradients. Activations of other layers are computed again in the backward pass
(arXiv 1604.06174).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from cat_modifier.calibration.attention import without_caches
from cat_modifier.calibration.padding import predicted_tokens
from cat_modifier.modifiers.cat_training.descent import Training, descend, draw_batches
from cat_modifier.modifiers.cat_training.layer import LayerTensors, TrainableLayer
from cat_modifier.modifiers.forward import replace_forward

__all__ = ["Distillation", "divergence"]

_WARM_UP = 5
"""Steps in which the learning rate grows: Adam knows nothing of the gradients' sizes yet"""

_SCALE = 1024.0
"""Factor of the loss: gradients of a mean over tokens would vanish in float16"""

_TOKENS_AT_ONCE = 512
"""Tokens whose probabilities are computed at once in float32"""


class Distillation:
    """
    Trains the corrections of all layers of a model together.

    :param model: the model, with transforms and without quantization
    :param layers: decoding layers with the inputs that are quantized
    :param samples: batches to train on, each the keyword arguments of the model
    :param held_out: batches to choose the corrections by
    """

    def __init__(
        self,
        model: Module,
        layers: list[TrainableLayer],
        samples: list[dict[str, Any]],
        held_out: list[dict[str, Any]],
    ):
        self.model, self.layers = model, layers
        self.samples, self.held_out = samples, held_out
        self.corrections = {
            name: one.requires_grad_()
            for layer in layers
            for name, one in layer.identity().items()
        }
        self._ratios: list[dict[str, Tensor]] = []

    def fit(
        self,
        steps: int,
        batch_size: int,
        learning_rate: float,
        patience: int,
        on_step: Callable[[], Any] = lambda: None,
    ) -> Training:
        """
        Train the corrections.

        :param steps: upper bound of the number of steps
        :param batch_size: samples per step
        :param learning_rate: learning rate of Adam after some steps; decays to 0 along a
            cosine
        :param patience: number of evaluations without progress before training stops, of ten
        :param on_step: called after each step
        :return: corrections of least divergence on held-out samples; errors in nats per token
        :raises ValueError: if the divergence is not finite before the first step
        """
        optimizer = torch.optim.Adam(self.corrections.values(), learning_rate, (0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
        batches = draw_batches(self.samples, batch_size)
        return descend(
            self.corrections,
            schedule,
            self._evaluate,
            lambda: self._add_gradients(next(batches)),
            steps,
            patience,
            on_step,
            type(self.model).__name__,
        )

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Search for ranges, and compute the divergence of held-out tokens, in nats"""
        # keep ranges until the next evaluation: to search for them takes longer than a step
        self._ratios = []
        for layer in self.layers:
            self._ratios.append(layer.range_ratios(layer.correct(self.corrections)))
            layer.release()
        leaves = [self._tensors(index).leaves(self.dtype) for index in range(len(self.layers))]
        total, tokens = 0.0, 0
        for sample in self.held_out:
            teacher = self._predict(sample)
            with self._student(leaves):
                error = divergence(self._predict(sample), teacher)
            total, tokens = total + error.item() * len(teacher), tokens + len(teacher)
        return total / tokens

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model computes with"""
        return next(iter(self.layers[0].inputs[0].linears.values())).weight.dtype

    def _tensors(self, index: int) -> LayerTensors:
        """Correct and quantize a layer, with gradients where they are enabled"""
        layer = self.layers[index]
        tensors = layer.quantize(layer.correct(self.corrections), self._ratios[index])
        layer.release()
        return tensors

    def _add_gradients(self, batch: list[dict[str, Any]]):
        """
        Add the gradients of a batch to the corrections.

        Weights are quantized once for all samples. Their gradients are summed over the
        samples. Then each layer is corrected again, to pass them on to its corrections.
        """
        leaves = [self._tensors(index).leaves(self.dtype) for index in range(len(self.layers))]
        for sample in batch:
            with torch.no_grad():
                teacher = self._predict(sample)
            with self._student(leaves):
                error = divergence(self._predict(sample), teacher)
                (error * _SCALE / len(batch)).backward()
        for index, one in enumerate(leaves):
            self._tensors(index).backward(one, _SCALE)

    def _predict(self, sample: dict[str, Any]) -> Tensor:
        """Compute the logits of real tokens, shape (tokens, vocabulary)"""
        inputs: Any = tensors_to_device(sample, get_execution_device(self.model))
        logits = _logits(self.model, inputs)
        mask = predicted_tokens(self.model, inputs)
        if mask is None or mask.shape != logits.shape[:-1]:
            return logits.flatten(0, -2)
        return logits[mask]

    @contextmanager
    def _student(self, leaves: list[LayerTensors]) -> Iterator[None]:
        """Let the layers compute with leaves, and forget their activations"""
        with ExitStack() as stack:
            for layer, tensors in zip(self.layers, leaves, strict=True):
                module = stack.enter_context(layer.computing_with(tensors))
                if torch.is_grad_enabled():
                    again = partial(_compute_again, module.forward)
                    stack.enter_context(replace_forward(module, again))
            yield


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: grows linearly, and decays to 0 along a cosine"""
    return min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def _compute_again(forward: Callable, *args, **kwargs) -> Any:
    """Call a function, and once more in the backward pass"""
    args, kwargs = without_caches(args, kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _logits(model: Module, sample: dict[str, Any]) -> Tensor:
    logits = getattr(model(**sample), "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} returns no logits, so that there is nothing to distil: "
            "use CATTrainingModifier instead of CATDistillationModifier, or load the model "
            "with its head (AutoModelForCausalLM)"
        )
    return logits


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """
    Compute the mean Kullback-Leibler divergence of predictions, in nats.

    :param student: logits, shape (tokens, vocabulary)
    :param teacher: logits of the same shape
    :return: KL(teacher || student), scalar, float32
    """
    total = student.new_zeros((), dtype=torch.float32)
    for pair in zip(
        student.split(_TOKENS_AT_ONCE), teacher.split(_TOKENS_AT_ONCE), strict=True
    ):
        total = total + _compute_again(_sum_of_divergences, *pair)
    return total / len(student)


def _sum_of_divergences(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (one.float().log_softmax(-1) for one in (student, teacher))
    return kl_div(student, teacher, reduction="sum", log_target=True)
