# SPDX-License-Identifier: Apache-2.0
"""vLLM's compressed-tensors config, extended by CAT transforms and integer W4A4"""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

from cat_modifier.checkpoint.schema import (
    CATScheme,
    CATTransformConfig,
    read_quantization_config,
)
from cat_modifier.checkpoint.integers import INT8_PRODUCT_RULE, is_integer
from cat_modifier.integrations.vllm.int8_linear import CATIntScheme
from cat_modifier.integrations.vllm.linear import CATLinearMethod, InputTransform
from cat_modifier.integrations.vllm.compat import (
    CompressedTensorsConfig,
    CompressedTensorsScheme,
    LinearBase,
    QuantizeMethodBase,
    RoutedExperts,
    WeightsMapper,
    get_layer_partition_names,
    get_pp_group,
)

__all__ = ["CATCompressedTensorsConfig", "METHOD_NAME"]

METHOD_NAME = "cat-modifier"
"""Name of the quantization method in vLLM"""

_COMPRESSED_TENSORS = "compressed-tensors"
"""The method that it extends"""


class CATCompressedTensorsConfig(CompressedTensorsConfig):
    """
    Claims the checkpoints that carry CAT transforms; and others of compressed-tensors only if
    it is asked for by name, for its kernels for integers. Linears with a transform
    get a :class:`CATLinearMethod` around the method that vLLM chooses for them.
    """

    cat_transforms: CATTransformConfig

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
        instance._set_transforms(transforms)
        return instance

    def get_name(self) -> str:
        return METHOD_NAME

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper):
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        transforms = self.cat_transforms.model_copy(deep=True)
        for _, args in transforms.inputs():
            # a name that maps to None is of a part which vLLM leaves out
            mapped = map(hf_to_vllm_mapper._map_name, args.targets)
            args.targets = [name for name in mapped if name is not None]
        self._set_transforms(transforms)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        parts = get_layer_partition_names(prefix, self.packed_modules_mapping)
        group = self._find_group(parts)
        if isinstance(layer, RoutedExperts):
            self._check_experts(prefix)
        elif group is not None and not isinstance(layer, LinearBase):
            raise NotImplementedError(
                f"{prefix} has an input transform, but vLLM computes it in a "
                f"{type(layer).__name__}: add it to `ignore` of CATModifier"
            )
        method = super().get_quant_method(layer, prefix)
        if group is None:
            return method
        scheme, owner = group
        self._claimed.update(parts)
        return CATLinearMethod(method, scheme, owner, owner in parts, self)

    def _get_scheme_from_parts(
        self,
        weight_quant: QuantizationArgs,
        input_quant: QuantizationArgs | None,
        output_quant: QuantizationArgs | None = None,
        format: str | None = None,
        layer_name: str | None = None,
    ) -> CompressedTensorsScheme:
        format = format or self.quant_format
        if CATIntScheme.suits(weight_quant, input_quant, output_quant, format):
            return CATIntScheme(weight_quant, input_quant, format)
        # vLLM has no kernel for these that quantizes activations: it would raise an error that
        # does not tell why, or run them with 16-bit activations without saying so
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

    def check_claimed(self):
        """
        After all layers are made: any Linear that vLLM made without asking for its
        quantization method would be applied to an input that is not transformed.

        :raises NotImplementedError: if there is one
        """
        for members in {tuple(members) for _, members in self._group_of.values()}:
            forgotten = [name for name in members if name not in self._claimed]
            # with pipeline parallelism another rank has the other groups
            is_elsewhere = len(forgotten) == len(members) and get_pp_group().world_size > 1
            if forgotten and not is_elsewhere:
                raise NotImplementedError(
                    f"{forgotten[0]} has an input transform, but vLLM computes it in a layer "
                    "which cannot be quantized: add it to `ignore` of CATModifier"
                )

    def _set_transforms(self, transforms: CATTransformConfig):
        self.cat_transforms = transforms
        self.input_transforms: dict[str, InputTransform] = {}
        self._claimed: set[str] = set()
        self._group_of = {
            name: (scheme, args.targets)
            for scheme, args in transforms.inputs()
            for name in args.targets
        }

    def _find_group(self, parts: list[str]) -> tuple[CATScheme, str] | None:
        """
        :param parts: names of the Linears which vLLM merges into one layer
        :return: scheme of their input transform, and name of the Linear that stores it
        """
        groups = [self._group_of.get(part) for part in parts]
        if all(group is None for group in groups):
            return None
        if any(group is None or group[1] != groups[0][1] for group in groups):
            raise ValueError(
                f"vLLM merges {', '.join(parts)} into one layer, but they do not share one "
                "transform in this checkpoint: group them by `mappings` of CATModifier"
            )
        scheme, members = groups[0]
        return scheme, members[0]

    def _check_experts(self, prefix: str):
        if any(name.startswith(f"{prefix}.") for name in self._group_of):
            raise NotImplementedError(
                f"{prefix}: transforms of the inputs of fused experts cannot be served by "
                "vLLM yet: add 're:.*mlp.experts.*' to `ignore` of CATModifier and of the "
                "quantization modifier"
            )
