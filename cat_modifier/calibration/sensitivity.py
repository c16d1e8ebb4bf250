# SPDX-License-Identifier: Apache-2.0
"""
How much the output of an attention module feels an error at each token of its inputs.

Noise of quantized activations and weights at token t of an input x adds
``||J_t n_t||^2`` to the error of the output, with ``J_t`` the Jacobian of the output with
respect to the outputs of the Linears at that token, and ``n_t`` the error there. Its mean over
tokens is, up to a constant, that of theorem 2.4 of arXiv 2603.04359 with the second moment

    ``Sx = E[s_t x_t x_t^T] / E[s_t]``,  ``s_t = ||J_t||_F^2``

in place of ``E[x_t x_t^T]``, if ``J_t`` and ``x_t`` are independent apart from ``s_t``: the
best alignment keeps its closed form. All tokens are alike where no token reads another, as in
an MLP. In attention a few keys and values are read by all later tokens, the first of a text
above all.

``s_t`` is estimated without bias by one backward pass: ``E||J_t^T v||^2 = ||J_t||_F^2`` for
random v of covariance I.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils._pytree import tree_leaves

from cat_modifier.calibration.attention import without_caches

__all__ = ["WeightedInput", "weighted_inputs"]


class WeightedInput(NamedTuple):
    """
    One call of a Linear.

    :param name: full name of the Linear
    :param x: its input, shape (..., d)
    :param weights: ``s_t`` of the input, summed over the Linears that read it, shape (...),
        float32
    """

    name: str
    x: Tensor
    weights: Tensor


def weighted_inputs(
    module: Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    linears: Mapping[str, Linear],
    token_scales: Tensor | None,
    generator: torch.Generator,
) -> list[WeightedInput]:
    """
    Run a module once more, and weight the tokens of the inputs of its Linears.

    :param module: attention, or what takes its place
    :param args: arguments of its call
    :param linears: Linears in the module, by full name
    :param token_scales: how much an error of the output counts at each token, shape (..., 1).
        None for equal scales
    :param generator: draws v
    :return: calls of the Linears, in their order; zero weights where the output does not
        depend on a Linear
    :raises RuntimeError: if the module has no gradient
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str, linear: Linear, inputs: tuple, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        # the tensor itself, where it has no graph: other Linears may read it later
        x = inputs[0].detach() if inputs[0].requires_grad else inputs[0]
        calls.append((name, x, output))
        return output.clone()  # what is a leaf of the graph must not be written to

    handles = [
        linear.register_forward_hook(partial(watch, name)) for name, linear in linears.items()
    ]
    try:
        with torch.enable_grad():
            args, kwargs = without_caches(args, kwargs)
            output = tree_leaves(module(*args, **kwargs))[0]
            direction = torch.randn(output.shape, generator=generator).to(output.device)
            if token_scales is not None and token_scales.shape[:-1] == output.shape[:-1]:
                direction *= token_scales
            gradients = torch.autograd.grad(
                (output.float() * direction).sum(),
                [output for _, _, output in calls],
                allow_unused=True,
                materialize_grads=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    weights: dict[tuple, Tensor] = {}
    for (_, x, _), gradient in zip(calls, gradients, strict=True):
        squares = gradient.float().square().sum(-1)
        weights[_memory(x)] = weights.get(_memory(x), 0) + squares
    return [WeightedInput(name, x, weights[_memory(x)]) for name, x, _ in calls]


def _memory(x: Tensor) -> tuple:
    """What tensors have in common that are one: inputs that Linears share"""
    return x.data_ptr(), x.shape, x.stride()
