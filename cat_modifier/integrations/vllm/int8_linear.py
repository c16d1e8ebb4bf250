# SPDX-License-Identifier: Apache-2.0
"""
Linear method for integer weights and activations of at most 8 bits: transform, quantize,
multiply on int8 matrix units.

No CPU, and no GPU since Hopper, multiplies 4-bit integers. But 4-bit integers are valid
8-bit operands, and their products are accumulated exactly in int32: W4A4 computed with an
int8 product is W4A4 to the last bit. On CPUs 4-bit weights stay packed in memory, two in a
byte; on GPUs, only if vLLM is asked to keep them packed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.checkpoint.integers import suits_int8_product
from cat_modifier.checkpoint.schema import CATScheme
from cat_modifier.integrations.vllm.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    LinearMethodBase,
    ModelWeightParameter,
    PackedvLLMParameter,
    current_platform,
    get_current_vllm_config_or_none,
    init_logger,
    register_weight_loader_v2_supported_method,
)
from cat_modifier.integrations.vllm.kernels import Int8Kernel, choose_kernel
from cat_modifier.integrations.vllm.registry import TransformedInput, TransformRegistry
from cat_modifier.integrations.vllm.unloaded import check_loaded, fill_unloaded
from cat_modifier.integrations.vllm.whole import adapt_loader, whole_weights
from cat_modifier.kernels.native import REMEDY, why_unavailable
from cat_modifier.kernels.ops import quantize, warm_up

__all__ = ["Int8LinearMethod", "Integers", "keeps_packed"]

logger = init_logger(f"vllm.{__name__}")

_OPTION = "cat_weights"


@dataclass(frozen=True)
class Integers:
    """
    Integers of a layer: weights with one scale per channel, activations with one dynamic
    scale per token.

    :param weight_bits: bits of a weight
    :param input_bits: bits of an activation
    :param input_symmetric: whether activations have no zero points
    :param is_packed: whether the checkpoint packs weights into int32
    """

    weight_bits: int
    input_bits: int
    input_symmetric: bool
    is_packed: bool

    @classmethod
    def read(
        cls,
        weight_quant: QuantizationArgs | None,
        input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None,
        format: str,
        is_w8a8_left_out: bool = True,
    ) -> "Integers | None":
        """
        Read the integers of Linears that an int8 product computes.

        :param is_w8a8_left_out: whether to leave W8A8 in ``int-quantized`` format to vLLM's
            own kernels
        :return: None for all others
        """
        if weight_quant is None or input_quant is None or output_quant is not None:
            return None
        if not suits_int8_product(weight_quant, input_quant):
            return None
        bits = weight_quant.num_bits, input_quant.num_bits
        if format not in ("pack-quantized", "int-quantized"):
            return None
        if format == "int-quantized" and bits == (8, 8) and is_w8a8_left_out:
            return None
        return cls(*bits, input_quant.symmetric, format == "pack-quantized")

    @property
    def weight_name(self) -> str:
        """Name of the weight's tensor"""
        return "weight_packed" if self.is_packed else "weight"

    @property
    def pack_factor(self) -> int:
        """Number of weights that a number of the weight's tensor holds"""
        return 32 // self.weight_bits if self.is_packed else 1

    def unpack(self, weight: Tensor, rows: int, columns: int) -> Tensor:
        """
        :param weight: tensor of the checkpoint, shape (rows, columns / pack_factor)
        :return: shape (rows, columns), int8
        """
        if not self.is_packed:
            return weight
        return unpack_from_int32(weight, self.weight_bits, (rows, columns))

    def check_columns(self, columns: int):
        """
        :param columns: input channels on a rank
        :raises ValueError: if a rank would get a part of a packed integer
        """
        if columns % self.pack_factor:
            raise ValueError(
                f"{columns} input channels on a rank are no multiple of the "
                f"{self.pack_factor} weights of {self.weight_bits} bits that the checkpoint "
                "packs into an integer: use a smaller `--tensor-parallel-size`, or make the "
                "checkpoint with `format: int-quantized`"
            )

    def check_clipping(self, scheme: CATScheme):
        """
        :raises ValueError: if the transform clips activations that cannot be clipped
        """
        if scheme.clip_ratio < 1 and self.input_symmetric:
            raise ValueError(
                "The transform_config of this checkpoint clips activations that are "
                "symmetric: the checkpoint is damaged"
            )

    def log(self, kernel: str, weight_bits_in_memory: int, layers: str = ""):
        """
        :param kernel: name of the product that computes a layer
        :param layers: layers other than Linears
        """
        logger.info_once(
            "Using %s for W%dA%d integers%s (activations: %d bits, per token, %s); weights "
            "take %d bits each in memory",
            kernel,
            self.weight_bits,
            self.input_bits,
            layers,
            self.input_bits,
            "symmetric" if self.input_symmetric else "asymmetric",
            weight_bits_in_memory,
        )


def keeps_packed(integers: Integers) -> bool:
    """
    Whether weights stay packed in memory: by default on CPUs, or as vLLM's option
    `--additional-config '{"cat_weights": "int4"}'` asks for.

    :raises ValueError: if the option has another value
    :raises RuntimeError: if the option asks for what this machine cannot compile
    """
    config = get_current_vllm_config_or_none()
    options = config.additional_config if config is not None else {}
    choice = options.get(_OPTION) if isinstance(options, dict) else None
    if choice not in (None, "int4", "int8"):
        raise ValueError(
            f"`{_OPTION}` of `--additional-config` must be int4, which takes less memory, or "
            f"int8, not {choice!r}"
        )
    if not current_platform.is_cpu():
        return integers.weight_bits == 4 and choice == "int4"
    reason = why_unavailable()
    is_small = integers.weight_bits == 4
    if reason is not None and choice == "int4" and is_small:
        raise RuntimeError(
            f"The product of packed weights cannot be compiled here ({reason}): {REMEDY}, or "
            f"leave out `{_OPTION}` of `--additional-config`"
        )
    if reason is not None:
        logger.warning_once(
            "Serving takes longer%s: the kernels cannot be compiled here (%s): %s",
            ", and weights take 8 bits each in memory" if is_small else "",
            reason,
            REMEDY,
        )
    return reason is None and is_small and choice != "int8"


@register_weight_loader_v2_supported_method
class Int8LinearMethod(LinearMethodBase):
    """
    Transforms an input, quantizes it, and multiplies it by integer weights.

    :param integers: integers of the layer
    :param registry: all transforms of the model
    :param source: transformed input; None to quantize the input as it is
    :param is_first: whether this layer holds the transform; others use it from there
    """

    def __init__(
        self,
        integers: Integers,
        registry: TransformRegistry,
        source: TransformedInput | None = None,
        is_first: bool = False,
    ):
        if source is not None:
            integers.check_clipping(source.scheme)
        self.integers = integers
        self.registry = registry
        self.source = source
        self.is_first = is_first
        self._keeps_packed = keeps_packed(integers)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **extra_weight_attrs,
    ):
        weight_loader = whole_weights(layer, weight_loader)
        rows = sum(output_partition_sizes)
        self.shape = (rows, input_size_per_partition)
        self.dtype = params_dtype
        self.kernel: Int8Kernel = choose_kernel(self._keeps_packed)(
            self.integers.weight_name, self.integers.input_symmetric, params_dtype
        )
        self.integers.check_columns(input_size_per_partition)
        if self.integers.is_packed:
            pack_factor = self.integers.pack_factor
            weight = PackedvLLMParameter(
                data=fill_unloaded(
                    torch.empty(
                        rows, input_size_per_partition // pack_factor, dtype=torch.int32
                    )
                ),
                input_dim=1,
                output_dim=0,
                packed_dim=1,
                packed_factor=Fraction(pack_factor),
                weight_loader=weight_loader,
            )
            shape = BasevLLMParameter(
                data=torch.empty(2, dtype=torch.int64),
                weight_loader=adapt_loader(layer, weight_loader, _first_shape),
            )
            layer.register_parameter("weight_shape", shape)
        else:
            weight = ModelWeightParameter(
                data=fill_unloaded(
                    torch.empty(rows, input_size_per_partition, dtype=torch.int8)
                ),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader,
            )
        layer.register_parameter(self.integers.weight_name, weight)
        scale = ChannelQuantScaleParameter(
            data=fill_unloaded(torch.empty(rows, 1, dtype=torch.float32)),
            output_dim=0,
            weight_loader=weight_loader,
        )
        layer.register_parameter("weight_scale", scale)
        # vLLM may quantize an input before the layer sees it, which would be too early
        layer.requires_unquantized_input = True
        if self.source is not None and self.is_first:
            self.source.add_to(layer, input_size, input_size_per_partition, params_dtype)

    def process_weights_after_loading(self, layer: Any):
        """
        :raises ValueError: if the transform or the weight was not loaded
        """
        integers = self.integers
        transform = None
        if self.source is not None:
            self.registry.check_claimed()
            transform = self.source.module
            if self.is_first:
                transform.check_loaded()
        weight = getattr(layer, integers.weight_name).data
        # rows of padding of an lm_head are not loaded
        rows = getattr(layer, "num_org_embeddings_per_partition", self.shape[0])
        scale = layer.weight_scale.data
        check_loaded(layer.prefix, integers.weight_name, weight[:rows], scale[:rows])
        # `weight_shape` stays: a weight reload brings it once more for each merged part
        self.kernel.process_weights(layer, integers.unpack(weight, *self.shape))
        inputs = layer.weight_scale.new_empty((0, self.shape[1]), dtype=self.dtype)
        warm_up(inputs, integers.input_bits, integers.input_symmetric, transform)
        integers.log(type(self.kernel).__name__, 4 if self._keeps_packed else 8)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        quantizer = quantize if self.source is None else self.source.module.quantize
        q, scales, zero_points = quantizer(
            x.reshape(-1, x.shape[-1]), self.integers.input_bits, self.integers.input_symmetric
        )
        out = self.kernel.apply(layer, q, scales, zero_points, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _first_shape(
    layer: Any, param: Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Take one shape of those of the Linears that Transformers merged while it saved"""
    return loaded_weight.reshape(-1, 2)[0]
