# SPDX-License-Identifier: Apache-2.0
"""vLLM's int8 matrix products, given codes that are quantized already"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cat_modifier.integrations.vllm.compat import current_platform, ops

__all__ = [
    "CutlassInt8Kernel",
    "Int8Kernel",
    "OneDNNInt8Kernel",
    "PackedInt4Kernel",
    "choose_kernel",
]


class Int8Kernel(ABC):
    """
    ``y = s_x s_w (x - z_x) W^T + bias`` for int8 codes, accumulated in int32.

    :param weight: codes, shape (out, in), int8
    :param weight_scale: shape (out, 1), float32
    :param symmetric: whether activations have no zero points
    :param out_dtype: of y
    """

    @abstractmethod
    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        symmetric: bool,
        out_dtype: torch.dtype,
    ): ...

    @abstractmethod
    def __call__(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """
        :param x: codes, shape (tokens, in), int8
        :param scale: shape (tokens, 1), float32
        :param zero_point: shape (tokens, 1), int32; None if symmetric
        :return: shape (tokens, out)
        """


class OneDNNInt8Kernel(Int8Kernel):
    """oneDNN on CPUs"""

    def __init__(self, weight, weight_scale, symmetric, out_dtype):
        # the handler keeps a raw pointer to the scales: they must live as long as it
        self.weight_scale = weight_scale
        self.out_dtype = out_dtype
        sums = weight.sum(dim=1, dtype=torch.float32)
        self.zero_point_correction = (sums * weight_scale.squeeze(1)).unsqueeze(0)
        self.handler = ops.create_onednn_scaled_mm(
            weight.t(), weight_scale, out_dtype, True, not symmetric, 32
        )

    def __call__(self, x, scale, zero_point, bias):
        out = torch.empty((x.shape[0], self.handler.n), dtype=self.out_dtype)
        ops.onednn_scaled_mm(
            self.handler, x, out, scale, zero_point, self.zero_point_correction, bias
        )
        return out


class CutlassInt8Kernel(Int8Kernel):
    """CUTLASS on the int8 tensor cores of NVIDIA GPUs"""

    def __init__(self, weight, weight_scale, symmetric, out_dtype):
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
        self.weight = weight.contiguous().t()  # (in, out), column-major
        self.weight_scale = weight_scale
        self.out_dtype = out_dtype
        self.weight_sums = weight.sum(dim=1, dtype=torch.int32).unsqueeze(0)

    def __call__(self, x, scale, zero_point, bias):
        operands = {
            "scale_a": scale,
            "scale_b": self.weight_scale,
            "out_dtype": self.out_dtype,
            "bias": bias,
        }
        if zero_point is None:
            return ops.cutlass_scaled_mm(x, self.weight, **operands)
        return ops.cutlass_scaled_mm_azp(
            x, self.weight, azp_adj=self.weight_sums, azp=zero_point, **operands
        )


class PackedInt4Kernel(Int8Kernel):
    """
    Weights of 4 bits stay packed in memory, and are unpacked to int8 before each product:
    half the memory of the other kernels, for more time. On CPUs and NVIDIA GPUs.
    """

    # what the product of a GPU needs, and always as many: a branch on the number of tokens
    # would be compiled into vLLM's graph as the first run took it
    _PADDING = 32

    def __init__(self, weight, weight_scale, symmetric, out_dtype):
        if weight.shape[1] % 8 or weight.shape[0] % 8:
            raise NotImplementedError(
                "Weights which stay packed must have multiples of 8 channels, not the shape "
                f"{tuple(weight.shape)} on each rank"
            )
        low, high = weight.unflatten(1, (-1, 2)).unbind(-1)
        self.packed = (low & 0xF) | (high << 4)
        self.weight_scale = weight_scale.squeeze(1)
        self.weight_sums = weight.sum(dim=1, dtype=torch.int32)
        self.out_dtype = out_dtype

    def __call__(self, x, scale, zero_point, bias):
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
