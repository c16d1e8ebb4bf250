# SPDX-License-Identifier: Apache-2.0
"""
Teaches Transformers' compressed-tensors quantizer to load CAT checkpoints.

Both classes take the place of their base class in Transformers' tables. Of a checkpoint
without CAT transforms they pass everything on to it.
"""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.utils import is_module_quantized
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.quantizer_compressed_tensors import (
    CompressedTensorsHfQuantizer,
)
from transformers.utils.quantization_config import CompressedTensorsConfig

from cat_modifier.checkpoint.config import (
    CATTransformConfig,
    mark_quantization_config,
    read_quantization_config,
)
from cat_modifier.checkpoint.saving import (
    check_tensor_names,
    find_transforms,
    save_atomically,
)
from cat_modifier.checkpoint.transform import (
    CATTransform,
    attach_transforms,
    expected_tensors,
    validate_transform,
)

__all__ = ["CATConfig", "CATHfQuantizer", "register"]


class CATConfig(CompressedTensorsConfig):
    """
    :param kwargs: quantization config as in ``config.json``

    Attributes:
        cat_transforms: of a CAT checkpoint; None of any other
    """

    cat_transforms: CATTransformConfig | None

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
    """Loads compressed-tensors checkpoints, and attaches their CAT transforms if any"""

    quantization_config: CATConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs,
    ):
        super()._process_model_before_weight_loading(
            model, checkpoint_files=checkpoint_files, **kwargs
        )
        if (transforms := self.quantization_config.cat_transforms) is not None:
            attach_transforms(model, transforms)
            if checkpoint_files is not None:
                check_tensor_names(find_transforms(checkpoint_files), expected_tensors(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        super()._process_model_after_weight_loading(model, **kwargs)
        if self.quantization_config.cat_transforms is None:
            return
        for name, module in model.named_modules():
            if isinstance(module, CATTransform):
                validate_transform(f"{name}.weight", module.weight, module.weight.shape)
        save_atomically(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        # the first forward pass decompresses the weights, but the config that is saved
        # with them promises compressed ones
        if self.quantization_config.cat_transforms is not None and any(
            is_module_quantized(module)
            and module.quantization_status != QuantizationStatus.COMPRESSED
            for module in model.modules()
        ):
            with torch.no_grad():
                self.compressor.compress_model(model, skip_compressed=True)
        return super().get_state_dict_and_metadata(model)


def register():
    """Let ``from_pretrained`` load CAT checkpoints. Safe to call again."""
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CATHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = CATConfig
