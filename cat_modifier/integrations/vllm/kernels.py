# SPDX-License-Identifier: Apache-2.0
"""vLLM's int8 matrix products, for operands that are quantized already."""

import os
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.integrations.vllm.compat import current_platform, ops, replace_parameter
from cat_modifier.kernels import packed

__all__ = [
    "CutlassInt8Kernel",
    "FLOATS_NEED_A_GPU",
    "Int8Kernel",
    "OneDNNInt8Kernel",
    "PackedInt4Kernel",
    "UnpackingInt4Kernel",
    "choose_kernel",
]

FLOATS_NEED_A_GPU = (
    "vLLM has no kernel for these floats on a CPU. NVFP4 and MXFP4 need a GPU; for a CPU take "
    "integers, as the recipe w4a4"
)

_PRODUCTS = "256"
"""Products that oneDNN keeps compiled. It compiles one for each number of tokens and shape of
weight, in half a millisecond, and each takes about 0.5 MB; by default it keeps 1,024, once for
PyTorch and once for vLLM"""


class Int8Kernel(ABC):
    """
    ``y = s_x s_w (x - z_x) W^T + bias`` for int8 operands, accumulated in int32.

    The layer owns the operands, as with vLLM's own kernels. A processed weight keeps the
    parameter name of the loaded one: vLLM offloads and reloads by name.

    | Parameter        | After :meth:`process_weights`                              |
    | ---------------- | ---------------------------------------------------------- |
    | ``weight_name``  | W as the kernel reads it                                   |
    | ``weight_scale`` | shape (out, 1), float32                                    |
    | ``azp_adj``      | shape (1, out), sums over the input channels of W, for the |
    |                  | zero points; none if activations are symmetric             |

    :param weight_name: name of the weight's parameter
    :param symmetric: whether activations have no zero points
    :param out_dtype: dtype of y
    """

    def __init__(self, weight_name: str, symmetric: bool, out_dtype: torch.dtype):
        self.weight_name = weight_name
        self.symmetric = symmetric
        self.out_dtype = out_dtype

    @abstractmethod
    def process_weights(self, layer: Module, weight: Tensor):
        """
        Replace the parameters of the layer by the operands of the kernel.

        :param weight: W, shape (out, in), int8
        """

    @abstractmethod
    def apply(
        self,
        layer: Module,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """
        :param x: shape (tokens, in), int8
        :param scale: shape (tokens, 1), float32
        :param zero_point: shape (tokens, 1), int32; None if symmetric
        :return: shape (tokens, out), ``out_dtype``
        """

    def _replace(self, layer: Module, weight: Tensor, sums: Tensor):
        replace_parameter(layer, self.weight_name, weight)
        replace_parameter(layer, "weight_scale", layer.weight_scale.data)
        if not self.symmetric:
            layer.azp_adj = Parameter(sums, requires_grad=False)

    def _scaled_sums(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Sum W over the input channels and multiply by the scale: shape (1, out), float32"""
        return (weight.sum(dim=1, dtype=torch.float32) * scale.squeeze(1)).unsqueeze(0)


class OneDNNInt8Kernel(Int8Kernel):
    """
    oneDNN on CPUs.

    A handler holds the weight in an order of its own, and the layer an empty parameter, as
    with vLLM's int8 layers for CPUs. ``azp_adj`` is multiplied by the scale.
    """

    def process_weights(self, layer, weight):
        scale = layer.weight_scale.data
        self.handler = ops.create_onednn_scaled_mm(
            weight.t(), scale, self.out_dtype, True, not self.symmetric, 32
        )
        # the handler points to the memory of this tensor. A weight reload copies it into the
        # older parameter: keep it alive
        self._scale_of_handler = scale
        sums = self._scaled_sums(weight, scale)
        self._replace(layer, weight.new_empty(0), sums)

    def apply(self, layer, x, scale, zero_point, bias):
        out = torch.empty((x.shape[0], self.handler.n), dtype=self.out_dtype)
        correction = None if zero_point is None else layer.azp_adj
        ops.onednn_scaled_mm(self.handler, x, out, scale, zero_point, correction, bias)
        return out


class PackedInt4Kernel(Int8Kernel):
    """
    This package's product for 4-bit weights on CPUs: the bits that :class:`OneDNNInt8Kernel`
    returns, from half the memory.

    W is packed as :func:`cat_modifier.kernels.packed.pack` does. ``azp_adj`` is multiplied by
    the scale.
    """

    def process_weights(self, layer, weight):
        sums = self._scaled_sums(weight, layer.weight_scale.data)
        self._replace(layer, packed.pack(weight), sums)

    def apply(self, layer, x, scale, zero_point, bias):
        return torch.ops.cat_modifier.packed_product(
            x,
            scale,
            zero_point,
            getattr(layer, self.weight_name),
            layer.weight_scale,
            None if zero_point is None else layer.azp_adj,
            bias,
            self.out_dtype,
        )


class CutlassInt8Kernel(Int8Kernel):
    """CUTLASS on the int8 tensor cores of NVIDIA GPUs. W has shape (out, in), int8"""

    def process_weights(self, layer, weight):
        if self.out_dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(
                "The int8 product of CUTLASS returns bfloat16 or float16, not "
                f"{self.out_dtype}: set `--dtype bfloat16`"
            )
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise NotImplementedError(
                "The int8 product of CUTLASS takes multiples of 16 channels, not a weight of "
                f"shape {tuple(weight.shape)} on each rank"
            )
        sums = weight.sum(dim=1, dtype=torch.int32).unsqueeze(0)
        self._replace(layer, weight.contiguous(), sums)

    def apply(self, layer, x, scale, zero_point, bias):
        operands = {
            "scale_a": scale,
            "scale_b": layer.weight_scale,
            "out_dtype": self.out_dtype,
            "bias": bias,
        }
        weight = getattr(layer, self.weight_name).t()  # (in, out), column-major
        if zero_point is None:
            return ops.cutlass_scaled_mm(x, weight, **operands)
        return ops.cutlass_scaled_mm_azp(
            x, weight, azp_adj=layer.azp_adj, azp=zero_point, **operands
        )


class UnpackingInt4Kernel(Int8Kernel):
    """
    Unpacks 4-bit weights to int8 before each product, on NVIDIA GPUs: half the memory of
    :class:`CutlassInt8Kernel`, for more time.

    W has shape (out, in / 2), int8: the even channel in the low half of a byte.
    """

    # padding rows that the product of a GPU needs. Always added: vLLM's graph would keep the
    # branch of its first run
    _PADDING = 32

    def process_weights(self, layer, weight):
        if weight.shape[1] % 8 or weight.shape[0] % 8:
            raise NotImplementedError(
                "Weights that stay packed must have multiples of 8 channels, not the shape "
                f"{tuple(weight.shape)} on each rank"
            )
        low, high = weight.unflatten(1, (-1, 2)).unbind(-1)
        sums = weight.sum(dim=1, dtype=torch.int32).unsqueeze(0)
        self._replace(layer, (low & 0xF) | (high << 4), sums)

    def apply(self, layer, x, scale, zero_point, bias):
        weight = getattr(layer, self.weight_name)
        # shifting left and back extends the sign
        halves = (weight << 4) >> 4, weight >> 4
        weight = torch.stack(halves, -1).flatten(1)
        tokens = x.shape[0]
        if x.is_cuda:
            x = torch.nn.functional.pad(x, (0, 0, 0, self._PADDING))
        product = torch._int_mm(x, weight.t()).narrow(0, 0, tokens)
        if zero_point is not None:
            product = product - zero_point * layer.azp_adj
        out = product * scale * layer.weight_scale.t()
        if bias is not None:
            out = out + bias
        return out.to(self.out_dtype)


def choose_kernel(keeps_packed: bool = False) -> type[Int8Kernel]:
    """
    Choose the int8 product of this platform.

    :param keeps_packed: whether 4-bit weights stay packed in memory
    :raises NotImplementedError: if there is none
    """
    if current_platform.is_cpu():
        # read once, at the first product of the process: also those of online transforms
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRODUCTS)
        return PackedInt4Kernel if keeps_packed else OneDNNInt8Kernel
    if current_platform.is_cuda() and keeps_packed:
        return UnpackingInt4Kernel
    # Blackwell has no int8 matrix products in vLLM
    if current_platform.is_cuda() and not current_platform.has_device_capability(100):
        return CutlassInt8Kernel
    raise NotImplementedError(
        "These integer activations are served on CPUs and on NVIDIA GPUs from Ampere to "
        f"Hopper, not on this {current_platform.device_name}. On Blackwell use NVFP4 or MXFP4"
    )
