# SPDX-License-Identifier: Apache-2.0
"""vLLM's int8 matrix products, given codes that are quantized already"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cat_modifier.serve.vllm_api import current_platform, ops

__all__ = ["CutlassInt8Kernel", "Int8Kernel", "OneDNNInt8Kernel", "choose_kernel"]


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


def choose_kernel() -> type[Int8Kernel]:
    """
    :raises NotImplementedError: if there is none for this platform
    """
    if current_platform.is_cpu():
        return OneDNNInt8Kernel
    # Blackwell has no int8 matrix products in vLLM
    if current_platform.is_cuda() and not current_platform.has_device_capability(100):
        return CutlassInt8Kernel
    raise NotImplementedError(
        "These integer activations are served on CPUs and on NVIDIA GPUs from Turing to "
        f"Hopper, not on this {current_platform.device_name}. On Blackwell use NVFP4 or MXFP4"
    )
