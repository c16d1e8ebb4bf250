# SPDX-License-Identifier: Apache-2.0
"""vLLM's int8 matrix products, given operands that are quantized already."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.integrations.vllm.compat import current_platform, ops

__all__ = [
    "CutlassInt8Kernel",
    "Int8Kernel",
    "OneDNNInt8Kernel",
    "PackedInt4Kernel",
    "choose_kernel",
]


class Int8Kernel(Module, ABC):
    """
    ``y = s_x s_w (x - z_x) W^T + bias`` for int8 operands, accumulated in int32.

    Tensors are buffers and parameters, which move with the layer.

    :param weight: shape (out, in), int8
    :param weight_scale: shape (out, 1), float32
    :param symmetric: whether activations have no zero points
    :param out_dtype: dtype of y
    """

    @abstractmethod
    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        symmetric: bool,
        out_dtype: torch.dtype,
    ):
        super().__init__()
        self.out_dtype = out_dtype

    @abstractmethod
    def forward(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """
        :param x: shape (tokens, in), int8
        :param scale: shape (tokens, 1), float32
        :param zero_point: shape (tokens, 1), int32; None if symmetric
        :return: shape (tokens, out), ``out_dtype``
        """


class OneDNNInt8Kernel(Int8Kernel):
    """
    oneDNN on CPUs. Its handler keeps the weights in an order of its own, as in vLLM's own
    int8 layers for CPUs.
    """

    def __init__(self, weight, weight_scale, symmetric, out_dtype):
        super().__init__(weight, weight_scale, symmetric, out_dtype)
        # the handler keeps a raw pointer to the scales: they must live as long as it
        self.register_buffer("weight_scale", weight_scale, persistent=False)
        sums = weight.sum(dim=1, dtype=torch.float32)
        correction = (sums * weight_scale.squeeze(1)).unsqueeze(0)
        self.register_buffer("zero_point_correction", correction, persistent=False)
        self.handler = ops.create_onednn_scaled_mm(
            weight.t(), weight_scale, out_dtype, True, not symmetric, 32
        )

    def forward(self, x, scale, zero_point, bias):
        out = torch.empty((x.shape[0], self.handler.n), dtype=self.out_dtype)
        ops.onednn_scaled_mm(
            self.handler, x, out, scale, zero_point, self.zero_point_correction, bias
        )
        return out


class CutlassInt8Kernel(Int8Kernel):
    """CUTLASS on the int8 tensor cores of NVIDIA GPUs"""

    def __init__(self, weight, weight_scale, symmetric, out_dtype):
        super().__init__(weight, weight_scale, symmetric, out_dtype)
        if out_dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(
                f"The int8 product of CUTLASS returns bfloat16 or float16, not {out_dtype}: "
                "set `--dtype bfloat16`"
            )
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise NotImplementedError(
                "The int8 product of CUTLASS takes multiples of 16 channels, not a weight of "
                f"shape {tuple(weight.shape)} on each rank"
            )
        self.weight = Parameter(weight.contiguous(), requires_grad=False)
        self.register_buffer("weight_scale", weight_scale, persistent=False)
        sums = weight.sum(dim=1, dtype=torch.int32).unsqueeze(0)
        self.register_buffer("weight_sums", sums, persistent=False)

    def forward(self, x, scale, zero_point, bias):
        operands = {
            "scale_a": scale,
            "scale_b": self.weight_scale,
            "out_dtype": self.out_dtype,
            "bias": bias,
        }
        weight = self.weight.t()  # (in, out), column-major
        if zero_point is None:
            return ops.cutlass_scaled_mm(x, weight, **operands)
        return ops.cutlass_scaled_mm_azp(
            x, weight, azp_adj=self.weight_sums, azp=zero_point, **operands
        )


class PackedInt4Kernel(Int8Kernel):
    """
    4-bit weights that stay packed in memory, and are unpacked to int8 before each product:
    half the memory of the other kernels, for more time. On CPUs and NVIDIA GPUs.
    """

    # rows that the product of a GPU needs, and always as many: vLLM's graph would keep the
    # branch of its first run
    _PADDING = 32

    def __init__(self, weight, weight_scale, symmetric, out_dtype):
        super().__init__(weight, weight_scale, symmetric, out_dtype)
        if weight.shape[1] % 8 or weight.shape[0] % 8:
            raise NotImplementedError(
                "Weights that stay packed must have multiples of 8 channels, not the shape "
                f"{tuple(weight.shape)} on each rank"
            )
        low, high = weight.unflatten(1, (-1, 2)).unbind(-1)
        self.packed = Parameter((low & 0xF) | (high << 4), requires_grad=False)
        self.register_buffer("weight_scale", weight_scale.squeeze(1), persistent=False)
        sums = weight.sum(dim=1, dtype=torch.int32)
        self.register_buffer("weight_sums", sums, persistent=False)

    def forward(self, x, scale, zero_point, bias):
        # shifted to the left and back, the sign comes along
        halves = (self.packed << 4) >> 4, self.packed >> 4
        weight = torch.stack(halves, -1).flatten(1)
        tokens = x.shape[0]
        if x.is_cuda:
            x = torch.nn.functional.pad(x, (0, 0, 0, self._PADDING))
        product = torch._int_mm(x, weight.t())[:tokens]
        if zero_point is not None:
            product = product - zero_point * self.weight_sums
        out = product * scale * self.weight_scale
        if bias is not None:
            out = out + bias
        return out.to(self.out_dtype)


def choose_kernel(keeps_packed: bool = False) -> type[Int8Kernel]:
    """
    :param keeps_packed: whether 4-bit weights are to stay packed in memory
    :raises NotImplementedError: if there is none for this platform
    """
    is_known = current_platform.is_cpu() or current_platform.is_cuda()
    if keeps_packed and is_known:
        return PackedInt4Kernel
    if current_platform.is_cpu():
        return OneDNNInt8Kernel
    # Blackwell has no int8 matrix products in vLLM
    if current_platform.is_cuda() and not current_platform.has_device_capability(100):
        return CutlassInt8Kernel
    raise NotImplementedError(
        "These integer activations are served on CPUs and on NVIDIA GPUs from Ampere to "
        f"Hopper, not on this {current_platform.device_name}. On Blackwell use NVFP4 or MXFP4"
    )
