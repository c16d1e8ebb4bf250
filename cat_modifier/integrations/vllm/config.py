# SPDX-License-Identifier: Apache-2.0
"""vLLM's compressed-tensors config: reads a CAT checkpoint and chooses linear methods."""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from cat_modifier.checkpoint.integers import INT8_PRODUCT_RULE, is_integer
from cat_modifier.checkpoint.schema import CATTransformConfig, read_quantization_config
from cat_modifier.integrations.vllm.compat import (
    CompressedTensorsConfig,
    CompressedTensorsScheme,
    LinearBase,
    QuantizeMethodBase,
    RoutedExperts,
    WeightsMapper,
    get_layer_partition_names,
    map_name,
)
from cat_modifier.integrations.vllm.int8_linear import Int8LinearMethod, Int8Scheme
from cat_modifier.integrations.vllm.linear import TransformLinearMethod
from cat_modifier.integrations.vllm.plugin import METHOD_NAME
from cat_modifier.integrations.vllm.registry import TransformRegistry

__all__ = ["CATCompressedTensorsConfig"]

_COMPRESSED_TENSORS = "compressed-tensors"
"""Method that this one extends"""


class CATCompressedTensorsConfig(CompressedTensorsConfig):
    """
    Claims the checkpoints that carry CAT transforms. Claims others of compressed-tensors
    only if asked for by name, for the integer kernels.
    """

    registry: TransformRegistry

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        # asked for by name, the kernels for integers serve stock checkpoints, too
        is_asked_for = (
            user_quant == METHOD_NAME
            and hf_quant_cfg.get("quant_method") == _COMPRESSED_TENSORS
        )
        return METHOD_NAME if is_asked_for or read_quantization_config(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CATCompressedTensorsConfig":
        no_transforms = config, CATTransformConfig.empty()
        stock, transforms = read_quantization_config(config) or no_transforms
        instance = super().from_config(stock)
        instance.registry = TransformRegistry(transforms)
        return instance

    def get_name(self) -> str:
        return METHOD_NAME

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper):
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.registry.map_names(lambda name: map_name(hf_to_vllm_mapper, name))

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        parts = self._parts(prefix)
        source = self.registry.find(parts)
        if isinstance(layer, RoutedExperts) and self.registry.has_below(prefix):
            raise NotImplementedError(
                f"{prefix}: transforms of the inputs of fused experts cannot be served by "
                "vLLM yet: add 're:.*mlp.experts.*' to `ignore` of CATModifier and of the "
                "quantization modifier"
            )
        if source is not None and not isinstance(layer, LinearBase):
            raise NotImplementedError(
                f"{prefix} has an input transform, but vLLM computes it in a "
                f"{type(layer).__name__}: add it to `ignore` of CATModifier"
            )
        method = super().get_quant_method(layer, prefix)
        scheme = getattr(layer, "scheme", None)
        is_first = source is not None and source.first in parts
        if source is not None:
            self.registry.claim(parts)
        if isinstance(scheme, Int8Scheme):
            return Int8LinearMethod(scheme, self.registry, source, is_first)
        if source is not None:
            return TransformLinearMethod(method, source, is_first, self.registry)
        return method

    def _parts(self, prefix: str) -> list[str]:
        """List the Linears of the checkpoint that vLLM merges into a layer"""
        # some checkpoints hold a merged Linear themselves, as GLM-4's gate_up_proj
        if self.registry.find([prefix]) is not None:
            return [prefix]
        return get_layer_partition_names(prefix, self.packed_modules_mapping)

    def _get_scheme_from_parts(
        self,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None = None,
        format: str | None = None,
        layer_name: str | None = None,
    ) -> CompressedTensorsScheme:
        format = format or self.quant_format
        if Int8Scheme.suits(weight_quant, input_quant, output_quant, format):
            return Int8Scheme(weight_quant, input_quant, format)
        # vLLM has no kernel for these that quantizes activations: it would raise an obscure
        # error, or silently run them with 16-bit activations
        if is_integer(weight_quant, input_quant) and (
            input_quant.num_bits < 8 or format == "pack-quantized"
        ):
            raise NotImplementedError(
                f"{layer_name}: {INT8_PRODUCT_RULE}. This checkpoint has weights of strategy "
                f"`{weight_quant.strategy}` (symmetric={weight_quant.symmetric}) and "
                f"activations of strategy `{input_quant.strategy}` "
                f"(dynamic={input_quant.dynamic})"
            )
        return super()._get_scheme_from_parts(
            weight_quant, input_quant, output_quant, format, layer_name
        )
