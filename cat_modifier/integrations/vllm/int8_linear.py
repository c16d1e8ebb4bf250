# SPDX-License-Identifier: Apache-2.0
"""
Linear method for integer weights and activations of at most 8 bits, on int8 matrix units:
transform, quantize, multiply.

No CPU, and no GPU since Hopper, multiplies 4-bit integers. But 4-bit integers are valid
8-bit operands, and their products are accumulated exactly in int32: W4A4 computed with an
int8 product is W4A4 to the last bit. Weights are kept in int8, one byte a weight, unless
vLLM is asked to keep them packed.
"""

from fractions import Fraction

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.nn import Module

from cat_modifier.checkpoint.integers import suits_int8_product
from cat_modifier.integrations.vllm.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    CompressedTensorsScheme,
    LinearMethodBase,
    ModelWeightParameter,
    PackedvLLMParameter,
    get_current_vllm_config_or_none,
    init_logger,
    register_weight_loader_v2_supported_method,
)
from cat_modifier.integrations.vllm.kernels import choose_kernel
from cat_modifier.integrations.vllm.registry import TransformedInput, TransformRegistry
from cat_modifier.kernels.ops import OnlineTransform, quantize, warm_up

__all__ = ["Int8LinearMethod", "Int8Scheme"]

logger = init_logger(f"vllm.{__name__}")

_OPTION = "cat_weights"


def _is_asked_to_keep_packed() -> bool:
    """Read vLLM's option `--additional-config '{"cat_weights": "int4"}'`"""
    config = get_current_vllm_config_or_none()
    options = config.additional_config if config is not None else {}
    choice = options.get(_OPTION, "int8") if isinstance(options, dict) else "int8"
    if choice not in ("int4", "int8"):
        raise ValueError(
            f"`{_OPTION}` of `--additional-config` must be int4, which takes less memory, or "
            f"int8, which is faster, not {choice!r}"
        )
    return choice == "int4"


class Int8Scheme(CompressedTensorsScheme):
    """
    What a checkpoint says about the integers of a layer: weights with one scale a channel,
    activations with one dynamic scale a token. :class:`Int8LinearMethod` computes.

    :param weight_quant: quantization of the weights
    :param input_quant: quantization of the activations
    :param format: ``pack-quantized`` or ``int-quantized``
    """

    def __init__(
        self, weight_quant: QuantizationArgs, input_quant: QuantizationArgs, format: str
    ):
        self.weight_bits = weight_quant.num_bits
        self.input_bits = input_quant.num_bits
        self.input_symmetric = input_quant.symmetric
        self.is_packed = format == "pack-quantized"

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

    def create_weights(self, *args, **kwargs):
        raise NotImplementedError("Int8LinearMethod makes the weights")

    def process_weights_after_loading(self, layer: Module):
        raise NotImplementedError("Int8LinearMethod processes the weights")

    def apply_weights(self, layer: Module, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError("Int8LinearMethod computes")


@register_weight_loader_v2_supported_method
class Int8LinearMethod(LinearMethodBase):
    """
    Transforms an input, quantizes it, and multiplies it by integer weights.

    :param scheme: integers of the layer
    :param registry: all transforms of the model
    :param source: transformed input; None to quantize the input as it is
    :param is_first: whether this layer holds the transform; others use it from there
    """

    def __init__(
        self,
        scheme: Int8Scheme,
        registry: TransformRegistry,
        source: TransformedInput | None = None,
        is_first: bool = False,
    ):
        self.scheme = scheme
        self.registry = registry
        self.source = source
        self.is_first = is_first
        self._keeps_packed = _is_asked_to_keep_packed() and scheme.weight_bits == 4

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader=None,
        **extra_weight_attrs,
    ):
        rows = sum(output_partition_sizes)
        self.shape = (rows, input_size_per_partition)
        self.out_dtype = params_dtype
        if self.scheme.is_packed:
            pack_factor = 32 // self.scheme.weight_bits
            if input_size_per_partition % pack_factor:
                raise ValueError(
                    f"{input_size_per_partition} input channels on a rank are no multiple of "
                    f"the {pack_factor} weights that the checkpoint packs into an integer: "
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
        # vLLM may quantize an input before the layer sees it, which would be too early
        layer.requires_unquantized_input = True
        if self.source is not None and self.is_first:
            self.source.add_to(layer, input_size, input_size_per_partition, params_dtype)

    def process_weights_after_loading(self, layer: Module):
        """
        :raises ValueError: if the transform was not loaded, or clips symmetric activations
        """
        scheme = self.scheme
        if self.source is not None:
            self.registry.check_claimed()
            if self.is_first:
                device = layer.weight_scale.device
                self.source.module.process_weights_after_loading(device)
        if scheme.is_packed:
            q = unpack_from_int32(layer.weight_packed.data, scheme.weight_bits, self.shape)
            del layer.weight_packed, layer.weight_shape
        else:
            q = layer.weight.data
            del layer.weight
        kernel = choose_kernel(self._keeps_packed)
        scales = layer.weight_scale.data
        del layer.weight_scale
        layer.int8_product = kernel(q, scales, scheme.input_symmetric, self.out_dtype)
        transform = self._transform()
        if (
            transform is not None
            and transform.clip_ratio is not None
            and scheme.input_symmetric
        ):
            raise ValueError(
                "The transform_config of this checkpoint clips activations that are "
                "symmetric: the checkpoint is damaged"
            )
        # a transform that another layer holds may be loaded later, and is warmed up there
        if transform is not None or self.source is None:
            inputs = q.new_empty((0, self.shape[1]), dtype=self.out_dtype)
            warm_up(inputs, scheme.input_bits, scheme.input_symmetric, transform)
        logger.info_once(
            "Using %s for W%dA%d integers (activations: %d bits, per token, %s); weights "
            "take %d bits each in memory",
            kernel.__name__,
            scheme.weight_bits,
            scheme.input_bits,
            scheme.input_bits,
            "symmetric" if scheme.input_symmetric else "asymmetric",
            4 if self._keeps_packed else 8,
        )

    def _transform(self) -> OnlineTransform | None:
        if self.source is None or self.source.module is None:
            return None
        return self.source.module.online

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        quantizer = quantize if self.source is None else self.source.module.online.quantize
        q, scales, zero_points = quantizer(
            x.reshape(-1, x.shape[-1]), self.scheme.input_bits, self.scheme.input_symmetric
        )
        out = layer.int8_product(q, scales, zero_points, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])
