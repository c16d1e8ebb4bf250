# SPDX-License-Identifier: Apache-2.0
"""
Transformers' compressed-tensors quantizer, extended by CAT checkpoints.

Both classes replace their base class in Transformers' tables. They leave checkpoints
without CAT transforms to it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.compressors import compress_module
from compressed_tensors.offload import from_accelerate
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.quantizer_compressed_tensors import (
    CompressedTensorsHfQuantizer,
)
from transformers.utils import quantization_config as stock

from cat_modifier.checkpoint.schema import (
    CATTransformConfig,
    mark_quantization_config,
    read_quantization_config,
)
from cat_modifier.checkpoint.token_batch import batch_tokens
from cat_modifier.checkpoint.transform_module import (
    CATTransform,
    attach_transforms,
    validate_stored_transform,
)
from cat_modifier.integrations.transformers.conversions import (
    with_whole_transforms,
    without_fusing,
)
from cat_modifier.integrations.transformers.experts import linearize_experts
from cat_modifier.integrations.transformers.heads import find_new_heads, rename_modules
from cat_modifier.integrations.transformers.loading import LoadingCheck, check_files
from cat_modifier.integrations.transformers.saving import save_atomically

__all__ = ["CATHfQuantizer", "CompressedTensorsConfig", "register"]


class CompressedTensorsConfig(stock.CompressedTensorsConfig):
    """
    Quantization config of a checkpoint, with its CAT transforms.

    The class has the name of its base class: Transformers compares names to tell whether a
    config passed to ``from_pretrained`` suits the checkpoint.

    :param kwargs: quantization config as in ``config.json``
    """

    cat_transforms: CATTransformConfig | None
    """Transforms of a CAT checkpoint; None for any other"""

    def __init__(self, **kwargs):
        read = read_quantization_config(kwargs)
        kwargs, self.cat_transforms = read or (kwargs, None)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        config = super().to_dict()
        if self.cat_transforms is not None:
            config["transform_config"] = self.cat_transforms.model_dump()
            config = mark_quantization_config(config)
        return config


class CATHfQuantizer(CompressedTensorsHfQuantizer):
    """Loads compressed-tensors checkpoints, and attaches their CAT transforms if any."""

    quantization_config: CompressedTensorsConfig
    _loading: LoadingCheck
    _fused: Sequence[str] = ()
    """Parameters of experts, in place of which the model has Linears"""

    @property
    def _transforms(self) -> CATTransformConfig | None:
        return getattr(self.quantization_config, "cat_transforms", None)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs,
    ):
        if self._transforms is not None:
            if checkpoint_files is None:
                raise ValueError("CAT checkpoints are loaded from files, not from a state_dict")
            check_files(checkpoint_files)
            self._fused = linearize_experts(model)
            quantization = self.compressor.quantization_config
            rename_modules(model, quantization, self._transforms)
            quantization.ignore += find_new_heads(model, checkpoint_files)
        super()._process_model_before_weight_loading(
            model, checkpoint_files=checkpoint_files, **kwargs
        )
        if self._transforms is not None:
            attach_transforms(model, self._transforms)
            batch_tokens(model)
            self._loading = LoadingCheck(model)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform]
    ) -> list[WeightTransform]:
        if self._transforms is not None:
            weight_conversions = without_fusing(weight_conversions, self._fused)
            owners = [args.targets[0] for _, args in self._transforms.inputs()]
            weight_conversions = with_whole_transforms(weight_conversions, owners)
        return super().update_weight_conversions(weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self._transforms is not None:
            self._loading.finish()
        super()._process_model_after_weight_loading(model, **kwargs)
        if self._transforms is None:
            return
        if hasattr(model, "_hf_hook"):
            # accelerate's hooks show no tensors that are offloaded, and the decompression in
            # the first forward pass would remove them while they run
            from_accelerate(model)
        for name, module in model.named_modules():
            if isinstance(module, CATTransform) and module.weight is not None:
                blocks = module.weight
                validate_stored_transform(
                    f"{name}.weight",
                    blocks,
                    tuple(blocks.shape),
                    module.scheme.precision,
                    module.args.sha256,
                )
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and part is not model:
                part.register_forward_pre_hook(partial(_decompress_all, model))
        # where llm-compressor looks for transforms when it writes a config of its own
        setattr(model, TRANSFORM_CONFIG_NAME, self._transforms)
        save_atomically(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        if self._transforms is not None and not self.quantization_config.dequantize:
            # the first forward pass decompresses the weights; the saved config promises
            # compressed ones
            decompressed = [
                module
                for module in model.modules()
                if is_module_quantized(module)
                and module.quantization_status != QuantizationStatus.COMPRESSED
            ]
            for module in decompressed:
                compress_module(module)
            if decompressed:
                status = QuantizationStatus.COMPRESSED
                self.compressor.quantization_config.quantization_status = status
                self.compressor.add_decompress_hook(model)
        return super().get_state_dict_and_metadata(model)


def _decompress_all(model: PreTrainedModel, part: PreTrainedModel, args: tuple):
    """
    Decompress a model before a part of it runs, as its forward pass would.

    `generate` calls an encoder first, which compressed-tensors does not notice.

    :param model: a partial argument rather than a closure: copies of the model need their own
    :param part: submodule that is called
    """
    handle = getattr(model, "ct_decompress_hook", None)
    if handle is not None:
        model._forward_pre_hooks[handle.id](model, ())


def register():
    """Let ``from_pretrained`` load CAT checkpoints. Safe to call again."""
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CATHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = CompressedTensorsConfig
