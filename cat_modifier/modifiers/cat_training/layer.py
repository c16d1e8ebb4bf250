# SPDX-License-Identifier: Apache-2.0
"""
A decoding layer whose transforms can be corrected.

The transform ``T`` of an input becomes ``R T``. The correction ``R`` has the blocks of T, and
starts as the identity. The weight ``W T^-1`` of a Linear becomes ``W T^-1 R^-1``. Without
quantization, the layer computes the same as before. The online Hadamard matrix stays between
the two: ``H R T`` and ``W T^-1 R^-1 H^T``.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear as multiply

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.checkpoint.transform_module import CATTransform, online_hadamard
from cat_modifier.functional.hadamard import apply_hadamard
from cat_modifier.functional.stored import dequantize_blocks
from cat_modifier.functional.transform import apply_blocks, apply_transform, multiply_heads
from cat_modifier.modifiers.cat_training.fake_quant import (
    quantize_activations,
    quantize_weight,
    range_ratio,
)
from cat_modifier.modifiers.forward import replace_forward

__all__ = ["LayerInput", "LayerTensors", "TrainableLayer"]


@dataclass(frozen=True)
class LayerInput:
    """
    An input inside a layer, and the Linears that read it.

    :param linears: Linears by full name
    :param transform: online transform; None for none
    :param value_projection: Linear whose rows hold the blocks; None if they are online
    """

    linears: dict[str, Linear]
    transform: CATTransform | None = None
    value_projection: ValueProjection | None = None

    @property
    def first(self) -> str:
        """Name of the first Linear"""
        return next(iter(self.linears))

    @property
    def correction_shape(self) -> tuple[int, int, int] | None:
        """Shape of R; None if there is no transform to correct"""
        if self.value_projection is not None:
            size = self.value_projection.head_dim
            heads = self.linears[self.first].in_features // size
            return (heads // self.value_projection.repeats, size, size)
        if self.transform is not None and self.transform.weight is not None:
            count, size, _ = self.transform.weight.shape
            return (count, size, size)
        return None


@dataclass
class LayerTensors:
    """
    Tensors that a layer computes with, float32.

    :param weights: weights by the name of the Linear
    :param biases: biases by the name of the Linear; Linears without a bias are left out
    :param blocks: blocks of the online transforms, by the first Linear of the input
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self, dtype: torch.dtype = torch.float32) -> "LayerTensors":
        """
        Copy the tensors, to gather gradients in.

        :param dtype: dtype of the weights and biases
        :return: tensors without history. Those that corrections change require gradients
        """

        def copy(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
            return {
                name: one.detach().to(dtype).requires_grad_(one.requires_grad)
                for name, one in values.items()
            }

        blocks = copy(self.blocks, torch.float32)
        return LayerTensors(copy(self.weights, dtype), copy(self.biases, dtype), blocks)

    def backward(self, leaves: "LayerTensors", scale: float):
        """
        Pass the gradients of leaves on to the corrections.

        :param leaves: result of :meth:`leaves`
        :param scale: factor of the gradients of the leaves, to divide by
        """
        outputs, gradients = [], []
        for one in fields(self):
            for name, leaf in getattr(leaves, one.name).items():
                if leaf.grad is not None:  # None for experts that no token was routed to
                    output = getattr(self, one.name)[name]
                    outputs.append(output)
                    gradients.append(leaf.grad.to(output.dtype) / scale)
        if outputs:
            torch.autograd.backward(outputs, gradients)


class TrainableLayer:
    """
    The tensors of a decoding layer, with and without corrections.

    :param layer: the module
    :param name: full name of the module
    :param inputs: inputs of all Linears that are quantized or transformed
    """

    def __init__(self, layer: Module, name: str, inputs: list[LayerInput]):
        self.layer, self.name, self.inputs = layer, name, inputs
        self._hadamard: dict[str, Tensor] = {}
        for one in inputs:
            device = one.linears[one.first].weight.device
            if one.transform is not None:
                matrix = online_hadamard(one.transform.scheme, device)
                if matrix is not None:
                    self._hadamard[one.first] = matrix

    @cached_property
    def base(self) -> LayerTensors:
        """Tensors without corrections; weights have the online Hadamard matrix taken out"""
        base = LayerTensors()
        for one in self.inputs:
            matrix = self._hadamard.get(one.first)
            for name, linear in one.linears.items():
                weight = linear.weight.detach().float()
                if matrix is not None and one.transform is not None:
                    interleave = one.transform.scheme.interleave
                    weight = apply_hadamard(weight, matrix.mT, interleave)
                base.weights[name] = weight
                if linear.bias is not None:
                    base.biases[name] = linear.bias.detach().float()
            if one.transform is not None and one.transform.weight is not None:
                blocks = one.transform.weight.detach()
                base.blocks[one.first] = dequantize_blocks(blocks, torch.float32)
        return base

    def release(self):
        """Free the float32 copies of the layer's tensors, until they are needed again"""
        self.__dict__.pop("base", None)

    def identity(self) -> dict[str, Tensor]:
        """Make identity corrections, by the first Linear of the input, float32"""
        corrections = {}
        for one in self.inputs:
            if one.correction_shape is not None:
                count, size, _ = one.correction_shape
                device = one.linears[one.first].weight.device
                corrections[one.first] = torch.eye(size, device=device).repeat(count, 1, 1)
        return corrections

    def correct(self, corrections: Mapping[str, Tensor]) -> LayerTensors:
        """
        Compute the tensors of the layer with corrections, with gradients.

        :param corrections: R, shape as in `correction_shape`, by the first Linear of the
            input
        """
        base, tensors = self.base, LayerTensors(biases=dict(self.base.biases))
        for one in self.inputs:
            correction = corrections.get(one.first)
            weights = {name: base.weights[name] for name in one.linears}
            blocks = base.blocks.get(one.first)
            if correction is not None:
                # a singular correction gives infinities, which stop the training
                inverse = torch.linalg.inv_ex(correction)[0]
                if one.value_projection is not None:
                    inverse = inverse.repeat_interleave(one.value_projection.repeats, 0)
                weights = {
                    name: apply_blocks(weight.to(inverse), inverse.mT)
                    for name, weight in weights.items()
                }
                if blocks is not None:
                    blocks = correction @ blocks.to(correction)
            for name, weight in weights.items():
                tensors.weights[name] = self._rotate(one, weight)
            if blocks is not None:
                tensors.blocks[one.first] = blocks
        for one in self.inputs:
            if one.value_projection is not None and one.first in corrections:
                _correct_values(tensors, one.value_projection.linear, corrections[one.first])
        return tensors

    def _rotate(self, one: LayerInput, weight: Tensor) -> Tensor:
        matrix = self._hadamard.get(one.first)
        if matrix is None or one.transform is None:
            return weight
        return apply_hadamard(weight, matrix.to(weight), one.transform.scheme.interleave)

    def range_ratios(self, tensors: LayerTensors) -> dict[str, Tensor]:
        """Compute :func:`range_ratio` of each quantized weight, by the name of the Linear"""
        with torch.no_grad():
            return {
                name: range_ratio(tensors.weights[name], args)
                for name, args in self._weight_args().items()
            }

    def quantize(self, tensors: LayerTensors, ratios: Mapping[str, Tensor]) -> LayerTensors:
        """
        Quantize the weights, with gradients.

        :param ratios: result of :meth:`range_ratios`
        """
        weights = dict(tensors.weights)
        for name, args in self._weight_args().items():
            weights[name] = quantize_weight(weights[name], args, ratios[name])
        return LayerTensors(weights, tensors.biases, tensors.blocks)

    def _weight_args(self) -> dict[str, QuantizationArgs]:
        schemes: dict[str, Any] = {
            name: getattr(linear, "quantization_scheme", None)
            for one in self.inputs
            for name, linear in one.linears.items()
        }
        return {name: one.weights for name, one in schemes.items() if one and one.weights}

    @contextmanager
    def computing_with(self, tensors: LayerTensors) -> Iterator[Module]:
        """
        Replace the Linears of the layer, and restore them at the end of the context.

        :param tensors: tensors to compute with. Inputs are quantized; weights are not
            quantized again
        :return: the layer
        """
        steps = []
        with ExitStack() as stack:
            for one in self.inputs:
                step = _InputStep(
                    one.transform, tensors.blocks.get(one.first), self._hadamard.get(one.first)
                )
                steps.append(step)
                for name, linear in one.linears.items():
                    path, _, child = name[len(self.name) + 1 :].rpartition(".")
                    parent = self.layer.get_submodule(path)
                    replacement = _Replacement(
                        step, linear, tensors.weights[name], tensors.biases.get(name)
                    )
                    setattr(parent, child, replacement)
                    stack.callback(setattr, parent, child, linear)
            forward = self.layer.forward

            def forward_and_forget(*args, **kwargs) -> Any:
                try:
                    return forward(*args, **kwargs)
                finally:
                    for step in steps:
                        step.forget()

            stack.enter_context(replace_forward(self.layer, forward_and_forget))
            yield self.layer


def _correct_values(tensors: LayerTensors, linear: str, correction: Tensor):
    """
    Correct the rows of a value projection, and its bias.

    :param linear: name of the value projection
    :param correction: one matrix per value head, shape (heads, head_dim, head_dim)
    """
    for values in (tensors.weights, tensors.biases):
        if linear in values:
            values[linear] = multiply_heads(values[linear].to(correction), correction)


class _InputStep:
    """Transforms and quantizes an input, once for all Linears that read it"""

    def __init__(
        self, transform: CATTransform | None, blocks: Tensor | None, hadamard: Tensor | None
    ):
        self.transform, self.blocks, self.hadamard = transform, blocks, hadamard
        self._last: tuple | None = None

    def __call__(self, x: Tensor, args: QuantizationArgs | None) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != args:
            self._last = (x, args, self._compute(x.float(), args))
        return self._last[2]

    def forget(self):
        """Free the last input, and what was computed of it"""
        self._last = None

    def _compute(self, x: Tensor, args: QuantizationArgs | None) -> Tensor:
        scheme = None if self.transform is None else self.transform.scheme
        interleave = 1 if scheme is None else scheme.interleave
        x = apply_transform(x, self.blocks, self.hadamard, interleave)
        if args is None:
            return x
        return quantize_activations(x, args, 1.0 if scheme is None else scheme.clip_ratio)


class _Replacement(Module):
    """Takes the place of a Linear"""

    def __init__(self, step: _InputStep, linear: Linear, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.step, self.weight, self.bias = step, weight, bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scheme = getattr(linear, "quantization_scheme", None)
        self.args = None if scheme is None else scheme.input_activations

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.step(x, self.args).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return multiply(quantized, self.weight.to(x.dtype), bias)
