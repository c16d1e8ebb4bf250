# SPDX-License-Identifier: Apache-2.0
"""
All imports from vLLM, 0.32 and 0.33. Their paths move between releases: only this module
has to follow. ``plugin`` alone imports more, for when an import here fails.
"""

import re

# isort: off
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_pp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe import (
    ApplyMoEActivationConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    FusedMoeWeightScaleSupported,
    RoutedExperts,
    apply_moe_activation,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (
    get_layer_partition_names,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.model_executor.utils import replace_parameter, set_weight_attrs
from vllm.platforms import current_platform

__all__ = [
    "ApplyMoEActivationConfig",
    "BaseModelLoader",
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "CompressedTensorsConfig",
    "CompressedTensorsScheme",
    "FusedMoEMethodBase",
    "FusedMoEQuantConfig",
    "FusedMoeWeightScaleSupported",
    "LinearBase",
    "LinearMethodBase",
    "ModelWeightParameter",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "QKVParallelLinear",
    "QuantizeMethodBase",
    "RoutedExperts",
    "WeightsMapper",
    "WorkerLoRAManager",
    "apply_moe_activation",
    "current_platform",
    "get_current_vllm_config_or_none",
    "get_forward_context",
    "get_layer_partition_names",
    "get_pp_group",
    "init_logger",
    "map_name",
    "mend_prefix",
    "ops",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "replace_parameter",
    "set_weight_attrs",
]


def map_name(mapper: WeightsMapper, name: str) -> str | None:
    """
    Map the name of a module as vLLM maps the names of its tensors.

    :param mapper: maps names of the checkpoint to names of vLLM's model
    :return: None for a module that vLLM leaves out
    """
    # some rules match a module's name only where something follows it, as ".fc1."
    mapped = mapper.map_name(f"{name}.weight")
    return None if mapped is None else mapped.removesuffix(".weight")


def mend_prefix(prefix: str) -> str:
    """
    Correct the name that vLLM gives to a layer of Whisper, `.encoder.layers.0.layers.mlp.fc1`

    :return: path of the layer in the model, `model.encoder.layers.0.mlp.fc1`
    """
    # a list of layers would have a number here
    prefix = re.sub(r"([.]layers[.]\d+)[.]layers[.](?!\d)", r"\1.", prefix)
    return f"model{prefix}" if prefix.startswith(".") else prefix
