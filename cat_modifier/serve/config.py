# SPDX-License-Identifier: Apache-2.0
"""vLLM's compressed-tensors config, extended by CAT transforms and integer W4A4"""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType

from cat_modifier.checkpoint.config import (
    CATScheme,
    CATTransformConfig,
    read_quantization_config,
)
from cat_modifier.serve.int_scheme import CATIntScheme
from cat_modifier.serve.linear import CATLinearMethod
from cat_modifier.serve.vllm_api import (
    CompressedTensorsConfig,
    CompressedTensorsScheme,
    LinearBase,
    QuantizeMethodBase,
    RoutedExperts,
    WeightsMapper,
    get_layer_partition_names,
)

__all__ = ["CATCompressedTensorsConfig", "METHOD_NAME"]

METHOD_NAME = "cat-modifier"
"""Name of the quantization method in vLLM"""


class CATCompressedTensorsConfig(CompressedTensorsConfig):
    """
    Claims the checkpoints that carry CAT transforms, and no other. Linears with a transform
    get a :class:`CATLinearMethod` around the method that vLLM chooses for them.
    """

    cat_transforms: CATTransformConfig

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return METHOD_NAME if read_quantization_config(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CATCompressedTensorsConfig":
        stock, transforms = read_quantization_config(config)
        instance = super().from_config(stock)
        instance._set_transforms(transforms)
        return instance

    def get_name(self) -> str:
        return METHOD_NAME

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper):
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        transforms = self.cat_transforms.model_copy(deep=True)
        for _, args in transforms.groups():
            # a name that maps to None is of a part which vLLM leaves out
            mapped = map(hf_to_vllm_mapper._map_name, args.targets)
            args.targets = [name for name in mapped if name is not None]
        self._set_transforms(transforms)

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        method = super().get_quant_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            self._refuse_experts(prefix)
        if not isinstance(layer, LinearBase):
            return method
        group = self._find_group(layer, prefix)
        if group is None:
            return method
        scheme, owner = group
        return CATLinearMethod(method, scheme, owner)

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
        # vLLM has no kernel for these that quantizes activations, and would run them with
        # 16-bit activations without saying so
        if _is_int(weight_quant) and _is_int(input_quant) and format == "pack-quantized":
            raise NotImplementedError(
                f"{layer_name}: W{weight_quant.num_bits}A{input_quant.num_bits} integers are "
                "served with symmetric weights of strategy `channel` and dynamic activations "
                f"of strategy `token`, not with weights of strategy `{weight_quant.strategy}`"
                f" (symmetric={weight_quant.symmetric}) and activations of strategy "
                f"`{input_quant.strategy}` (dynamic={input_quant.dynamic})"
            )
        return super()._get_scheme_from_parts(
            weight_quant, input_quant, output_quant, format, layer_name
        )

    def _set_transforms(self, transforms: CATTransformConfig):
        self.cat_transforms = transforms
        self._group_of = {
            name: (scheme, args.targets)
            for scheme, args in transforms.groups()
            for name in args.targets
        }

    def _find_group(self, layer: torch.nn.Module, prefix: str) -> tuple[CATScheme, str] | None:
        """Scheme of the input transform of a layer, and name of the Linear that stores it"""
        parts = get_layer_partition_names(prefix, self.packed_modules_mapping)
        groups = [self._group_of.get(part) for part in parts]
        if all(group is None for group in groups):
            return None
        if any(group is None or group[1] != groups[0][1] for group in groups):
            raise ValueError(
                f"vLLM merges {', '.join(parts)} into one layer, but they do not share one "
                "transform in this checkpoint: group them by `mappings` of CATModifier"
            )
        scheme, members = groups[0]
        if others := [name for name in members if name not in parts]:
            raise NotImplementedError(
                f"{', '.join(parts)} share their transform with {', '.join(others[:4])}, "
                "which vLLM computes in another layer: separate them by `mappings` of "
                "CATModifier"
            )
        return scheme, members[0]

    def _refuse_experts(self, prefix: str):
        parent = prefix.rpartition(".")[0]
        if any(name.startswith((f"{prefix}.", f"{parent}.")) for name in self._group_of):
            raise NotImplementedError(
                f"{prefix}: transforms of the inputs of fused experts cannot be served by "
                "vLLM yet: add 're:.*experts.*' to `ignore` of CATModifier"
            )


def _is_int(args: QuantizationArgs | None) -> bool:
    return args is not None and args.type == QuantizationType.INT
