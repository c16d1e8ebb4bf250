# SPDX-License-Identifier: Apache-2.0
"""
A scale for each token, whatever the shape of the input of a Linear.

Strategy `token` of compressed-tensors gives a scale to each pair of the first two indices.
That is a token only if the input has three: experts, and OPT's MLP, pass two, and all their
tokens would share one scale.
"""

from compressed_tensors.quantization import QuantizationStrategy
from torch import Size, Tensor
from torch.nn import Linear, Module

__all__ = ["batch_tokens"]


def batch_tokens(model: Module):
    """
    Let every Linear with a scale for each token read its tokens as one batch.

    Safe to call again, and before Linears are quantized.

    :param model: hooks of its Linears that change inputs are attached already, or prepended
    """
    for module in model.modules():
        if isinstance(module, Linear) and not any(
            isinstance(getattr(hook, "__self__", None), _TokenBatch)
            for hook in module._forward_pre_hooks.values()
        ):
            hooks = _TokenBatch()
            module.register_forward_pre_hook(hooks.flatten)
            module.register_forward_hook(hooks.restore)


class _TokenBatch:
    """Hooks of one Linear that make a batch of its tokens, and give back the shape after"""

    def __init__(self):
        self._shape: Size | None = None

    def flatten(self, linear: Module, args: tuple) -> tuple | None:
        scheme = getattr(linear, "quantization_scheme", None)
        inputs = None if scheme is None else scheme.input_activations
        is_needed = (
            inputs is not None
            and inputs.strategy == QuantizationStrategy.TOKEN
            and args[0].ndim != 3
        )
        self._shape = args[0].shape if is_needed else None
        return (args[0].reshape(1, -1, args[0].shape[-1]), *args[1:]) if is_needed else None

    def restore(self, linear: Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._shape is None:
            return None
        return output.reshape(*self._shape[:-1], output.shape[-1])
