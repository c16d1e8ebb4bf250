# SPDX-License-Identifier: Apache-2.0
"""vLLM's compressed-tensors config: reads a CAT checkpoint and chooses linear methods."""

import re
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

from cat_modifier.checkpoint.integers import INT8_PRODUCT_RULE, is_integer
from cat_modifier.checkpoint.marker import METHOD_NAME
from cat_modifier.checkpoint.names import layer_of
from cat_modifier.checkpoint.schema import CATTransformConfig, read_quantization_config
from cat_modifier.integrations.vllm.compat import (
    CompressedTensorsConfig,
    CompressedTensorsScheme,
    LinearBase,
    ParallelLMHead,
    QuantizeMethodBase,
    RoutedExperts,
    WeightsMapper,
    current_platform,
    get_current_vllm_config_or_none,
    get_layer_partition_names,
    map_name,
    mend_prefix,
)
from cat_modifier.integrations.vllm.int8_linear import Int8LinearMethod, Integers
from cat_modifier.integrations.vllm.kernels import FLOATS_NEED_A_GPU
from cat_modifier.integrations.vllm.linear import TransformLinearMethod
from cat_modifier.integrations.vllm.lora import check_experts
from cat_modifier.integrations.vllm.moe import find_experts_method
from cat_modifier.integrations.vllm.registry import TransformRegistry

__all__ = ["CATCompressedTensorsConfig"]

_COMPRESSED_TENSORS = "compressed-tensors"
"""Method that this one extends"""

_LEAST_CAPABILITY = 80
"""Compute capability of Ampere, the first with bfloat16"""

_DRAFT = "draft_model."
"""What vLLM puts before the names of a model that drafts for another one"""

_BASE = "model."
"""What vLLM puts before the names of a base model saved without a head, as embedding models"""

_PROCESSED = ("runai_streamer_sharded", "sharded_state", "tensorizer")
"""Load formats whose files hold weights as kernels read them"""


class CATCompressedTensorsConfig(CompressedTensorsConfig):
    """
    Claims the checkpoints that carry CAT transforms. Claims others of compressed-tensors
    only if asked for by name, for the integer kernels.
    """

    registry: TransformRegistry
    packed_modules_mapping: dict[str, list[str]]

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
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
        prefix = mend_prefix(prefix.removeprefix(_DRAFT))
        if isinstance(layer, RoutedExperts):
            _check_load_format()
            method = find_experts_method(self, self.registry, layer, prefix)
            if method is not None:
                check_experts(prefix)
            return method or super().get_quant_method(layer, prefix)
        parts = self._parts(layer, prefix)
        source = self.registry.find(parts)
        if source is None and prefix.startswith(_BASE):
            base = self._parts(layer, prefix.removeprefix(_BASE))
            if (source := self.registry.find(base)) is not None:
                parts, prefix = base, prefix.removeprefix(_BASE)
        is_quantized = isinstance(layer, LinearBase) and self.get_scheme_dict(layer, prefix)
        if source is None and is_quantized:
            parts = self.registry.adopt(prefix, parts) or parts
            source = self.registry.find(parts)
        if source is not None and not isinstance(layer, LinearBase | ParallelLMHead):
            raise NotImplementedError(
                f"{prefix} has an input transform, but vLLM computes it in a "
                f"{type(layer).__name__}: add it to `ignore` of CATModifier"
            )
        if source is not None:
            _check_names(prefix)
        _check_load_format()
        self._check_mla(layer, prefix)
        integers = self._find_integers(layer, prefix)
        method = None if integers else super().get_quant_method(layer, prefix)
        is_first = False
        if source is not None and method is None and integers is None:
            raise NotImplementedError(
                f"{prefix} has an input transform, but is not quantized by its name: name it "
                "in `targets` of the modifier that quantizes, beside `Linear`, or add it to "
                "`ignore` of CATModifier"
            )
        if source is not None:
            is_first = source.first in parts
            _check_offload(prefix, source.first)
            self.registry.claim(parts)
        if integers is not None:
            return Int8LinearMethod(integers, self.registry, source, is_first)
        if source is not None:
            return TransformLinearMethod(method, source, is_first, self.registry)
        return method

    def _parts(self, layer: torch.nn.Module, prefix: str) -> list[str]:
        """List the Linears of the checkpoint that vLLM merges into a layer"""
        # some checkpoints hold a merged Linear themselves, as GLM-4's gate_up_proj
        if self.registry.find([prefix]) is not None:
            return [prefix]
        parts = get_layer_partition_names(prefix, self.packed_modules_mapping)
        if _values_are_keys(prefix):
            return [part for part in parts if not part.endswith(".v_proj")]
        count = len(getattr(layer, "output_sizes", ()))
        if parts == [prefix] and count > 1:
            # not all models of vLLM say what they merge
            parent, _, name = prefix.rpartition(".")
            parts = self.registry.find_siblings(parent, count) or parts
            if parts != [prefix]:
                parts_of = {name: [part.rpartition(".")[2] for part in parts]}
                self.packed_modules_mapping = self.packed_modules_mapping | parts_of
        return parts

    def _check_mla(self, layer: torch.nn.Module, prefix: str):
        """
        :raises NotImplementedError: if vLLM's multi-head latent attention would read a weight
            by quantizing the identity matrix: its keys and values would be noise
        """
        config = get_current_vllm_config_or_none()
        is_mla = config is not None and config.model_config and config.model_config.use_mla
        if not is_mla or not prefix.endswith(".kv_b_proj"):
            return
        if (self.get_scheme_dict(layer, prefix) or {}).get("input_activations") is not None:
            raise NotImplementedError(
                f"{prefix}: multi-head latent attention of vLLM reads this weight, and cannot "
                "where its input is quantized: add 're:.*kv_b_proj' to `ignore` of "
                "CATModifier and of the quantization modifier"
            )

    def _find_integers(self, layer: torch.nn.Module, prefix: str) -> Integers | None:
        """Find the integers of a layer that this package's own linear method serves"""
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        scheme = self.get_scheme_dict(layer, prefix)
        if not scheme:
            return None
        integers = Integers.read(
            scheme.get("weights"),
            scheme.get("input_activations"),
            scheme.get("output_activations"),
            scheme["format"],
            # vLLM's own kernel for CPUs lets the weight go, which LoRA asks for, and computes
            # noise after a weight reload
            is_w8a8_left_out=not current_platform.is_cpu(),
        )
        if integers is not None:
            self._check_scheme_supported(_LEAST_CAPABILITY)
        return integers

    def _get_scheme_from_parts(
        self,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None = None,
        format: str | None = None,
        layer_name: str | None = None,
    ) -> CompressedTensorsScheme:
        format = format or self.quant_format
        # vLLM has no kernel that quantizes these activations: it would raise an obscure error,
        # or run with 16-bit activations and not say so, as symmetric ones on a CPU
        if (
            input_quant is not None
            and is_integer(weight_quant, input_quant)
            and (input_quant.num_bits < 8 or format == "pack-quantized")
        ):
            raise NotImplementedError(
                f"{layer_name}: {INT8_PRODUCT_RULE}. This checkpoint has weights of strategy "
                f"`{weight_quant.strategy}` (symmetric={weight_quant.symmetric}) and "
                f"activations of strategy `{input_quant.strategy}` "
                f"(dynamic={input_quant.dynamic})"
            )
        try:
            return super()._get_scheme_from_parts(
                weight_quant, input_quant, output_quant, format, layer_name
            )
        except ValueError as error:
            # vLLM gives no reason if it has no kernel at all for a platform
            if current_platform.is_cpu() and weight_quant.type == QuantizationType.FLOAT:
                raise NotImplementedError(f"{layer_name}: {FLOATS_NEED_A_GPU}") from error
            raise


def _values_are_keys(prefix: str) -> bool:
    """Whether a layer has no v_proj, as some of Gemma 4, where vLLM loads k_proj twice"""
    config = get_current_vllm_config_or_none()
    text: Any = config and config.model_config and config.model_config.hf_text_config
    match = re.search(r"[.]layers[.](\d+)[.].*[.]qkv_proj$", prefix)
    if match is None or not getattr(text, "attention_k_eq_v", False):
        return False
    return text.layer_types[int(match[1])] == "full_attention"


def _check_names(prefix: str):
    """
    :raises NotImplementedError: if vLLM would reorder the elements of a transform
    """
    config = get_current_vllm_config_or_none()
    architectures = (config and config.model_config and config.model_config.architectures) or ()
    # vLLM's loader of this model reorders every tensor of this name, whatever it is
    if prefix.endswith("query_key_value") and any("Bloom" in one for one in architectures):
        raise NotImplementedError(
            f"{prefix}: vLLM reorders all tensors of this name in a Bloom model, transforms "
            "included: add 're:.*query_key_value' to `ignore` of CATModifier"
        )


def _check_load_format():
    """
    :raises NotImplementedError: if weights are loaded in their processed form, which vLLM
        would process again
    """
    config = get_current_vllm_config_or_none()
    load_format = "auto" if config is None else config.load_config.load_format
    if load_format in _PROCESSED:
        raise NotImplementedError(
            f"`--load-format {load_format}` cannot load a model with this quantization: its "
            "files hold processed weights, which vLLM would process again. Load the "
            "original checkpoint"
        )


def _check_offload(prefix: str, first: str):
    """
    :param prefix: name of a layer
    :param first: name of the Linear that holds the transform of its input
    :raises NotImplementedError: if vLLM offloads decoder layers, and the two are in different
        ones: the transform is on the device only while its own layer runs
    """
    config = get_current_vllm_config_or_none()
    if config is None:
        return
    options = config.offload_config
    is_offloaded = options.uva.cpu_offload_gb > 0 or options.prefetch.offload_group_size > 0
    if is_offloaded and layer_of(prefix) != layer_of(first):
        raise NotImplementedError(
            f"{prefix} uses the transform of {first}, in another decoder layer: weights of "
            "this model cannot be offloaded to the CPU"
        )
