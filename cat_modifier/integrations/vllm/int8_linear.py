# SPDX-License-Identifier: Apache-2.0
"""
Integer weights and activations of at most 8 bits, on int8 matrix units.

No CPU, and no GPU since Hopper, multiplies 4-bit integers. But 4-bit codes are valid
8-bit operands, and products of them are accumulated exactly in int32: W4A4 computed with
an int8 product is W4A4 to the last bit. Weights are kept in int8, one byte a weight, unless
vLLM is asked to keep them packed.
"""

from fractions import Fraction
from typing import Protocol

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.checkpoint.integers import suits_int8_product
from cat_modifier.kernels.ops import PreparedTransform, quantize, warm_up
from cat_modifier.integrations.vllm.kernels import Int8Kernel, choose_kernel
from cat_modifier.integrations.vllm.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    CompressedTensorsScheme,
    ModelWeightParameter,
    PackedvLLMParameter,
    get_current_vllm_config_or_none,
    init_logger,
)

__all__ = ["CATIntScheme"]

logger = init_logger(f"vllm.{__name__}")


_OPTION = "cat_weights"


def _asked_to_keep_packed() -> bool:
    """By vLLM's option `--additional-config '{"cat_weights": "int4"}'`"""
    config = get_current_vllm_config_or_none()
    options = config.additional_config if config is not None else {}
    choice = options.get(_OPTION, "int8") if isinstance(options, dict) else "int8"
    if choice not in ("int4", "int8"):
        raise ValueError(
            f"`{_OPTION}` of `--additional-config` must be int4, which takes less memory, or "
            f"int8, which is faster, not {choice!r}"
        )
    return choice == "int4"


class TransformsInput(Protocol):
    """
    Attributes:
        prepared: None until the weights of the layer which has it are loaded
    """

    prepared: PreparedTransform | None


class CATIntScheme(CompressedTensorsScheme):
    """
    Symmetric integer weights with one scale a channel; integer activations with one
    dynamic scale a token, symmetric or not.

    :param weight_quant: of the weights
    :param input_quant: of the activations
    :param format: ``pack-quantized`` or ``int-quantized``

    Attributes:
        input_transform: applied to the input before it is quantized; None if there is none
    """

    input_transform: TransformsInput | None = None

    def __init__(
        self, weight_quant: QuantizationArgs, input_quant: QuantizationArgs, format: str
    ):
        self.weight_bits = weight_quant.num_bits
        self.input_bits = input_quant.num_bits
        self.input_symmetric = input_quant.symmetric
        self.is_packed = format == "pack-quantized"
        self.kernel: Int8Kernel | None = None
        self._keeps_packed = _asked_to_keep_packed()

    @classmethod
    def suits(
        cls,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None,
        format: str,
    ) -> bool:
        """
        Whether this scheme is the one to serve a layer: one that it can serve, except for
        W8A8 in ``int-quantized`` format, for which vLLM has kernels
        """
        if output_quant is not None or not suits_int8_product(weight_quant, input_quant):
            return False
        if format == "int-quantized":
            return (weight_quant.num_bits, input_quant.num_bits) != (8, 8)
        return format == "pack-quantized"

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # Ampere, the first with bfloat16

    def create_weights(
        self,
        layer: Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader,
        **kwargs,
    ):
        rows = sum(output_partition_sizes)
        self.shape = (rows, input_size_per_partition)
        self.out_dtype = params_dtype
        if self.is_packed:
            pack_factor = 32 // self.weight_bits
            if input_size_per_partition % pack_factor:
                raise ValueError(
                    f"{input_size_per_partition} input channels on a rank are no multiple of "
                    f"the {pack_factor} weights which the checkpoint packs into an integer: "
                    "use a smaller `--tensor-parallel-size`"
                )
            weight = PackedvLLMParameter(
                data=torch.empty(
                    rows, input_size_per_partition // pack_factor, dtype=torch.int32
                ),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=Fraction(pack_factor),
                weight_loader=weight_loader,
            )
            layer.register_parameter("weight_packed", weight)
            shape = BasevLLMParameter(
                data=torch.empty(2, dtype=torch.int64), weight_loader=weight_loader
            )
            layer.register_parameter("weight_shape", shape)
        else:
            weight = ModelWeightParameter(
                data=torch.empty(rows, input_size_per_partition, dtype=torch.int8),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
            )
            layer.register_parameter("weight", weight)
        scale = ChannelQuantScaleParameter(
            data=torch.empty(rows, 1, dtype=torch.float32),
            output_dim=0,
            weight_loader=weight_loader,
        )
        layer.register_parameter("weight_scale", scale)

    def process_weights_after_loading(self, layer: Module):
        if self.is_packed:
            codes = unpack_from_int32(layer.weight_packed.data, self.weight_bits, self.shape)
            del layer.weight_packed, layer.weight_shape
        else:
            codes = layer.weight.data
            del layer.weight
        keeps_packed = self._keeps_packed and self.weight_bits == 4
        kernel = choose_kernel(keeps_packed)
        self.kernel = kernel(
            codes, layer.weight_scale.data, self.input_symmetric, self.out_dtype
        )
        layer.weight_scale = Parameter(layer.weight_scale.data, requires_grad=False)
        inputs = codes.new_empty((0, self.shape[1]), dtype=self.out_dtype)
        transform = self.input_transform and self.input_transform.prepared
        if transform is not None and transform.clip_ratio is not None and self.input_symmetric:
            raise ValueError(
                "The transform_config of this checkpoint clips activations which are "
                "symmetric: the checkpoint is damaged"
            )
        # one of a layer whose weights are processed later is warmed up there
        if transform is not None or self.input_transform is None:
            warm_up(inputs, self.input_bits, self.input_symmetric, transform)
        logger.info_once(
            "Using %s for W%dA%d integers (activations: %d bits, per token, %s); weights "
            "take %d bits each in memory",
            kernel.__name__,
            self.weight_bits,
            self.input_bits,
            self.input_bits,
            "symmetric" if self.input_symmetric else "asymmetric",
            4 if keeps_packed else 8,
        )

    def apply_weights(self, layer: Module, x: Tensor, bias: Tensor | None) -> Tensor:
        transform = self.input_transform
        quantizer = quantize if transform is None else transform.prepared.quantize
        codes, scales, zero_points = quantizer(
            x.reshape(-1, x.shape[-1]), self.input_bits, self.input_symmetric
        )
        out = self.kernel(codes, scales, zero_points, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])
