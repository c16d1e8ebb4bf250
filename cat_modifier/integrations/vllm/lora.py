# SPDX-License-Identifier: Apache-2.0
"""
LoRA. An adapter is added to the output of a layer and reads its input before the transform: it
needs no change, except where a transform is fused into the weights.
"""

from collections.abc import Callable
from typing import Any

from wrapt import wrap_function_wrapper

from cat_modifier.integrations.vllm.compat import (
    WorkerLoRAManager,
    get_current_vllm_config_or_none,
)

__all__ = ["add_lora_check", "check_experts", "note_fused"]

_FUSED = "_cat_fused"
"""Attribute of a model: its Linears that adapters of the original model do not fit"""

_ATTENTION = "q_proj k_proj v_proj o_proj"


def check_experts(prefix: str):
    """
    :param prefix: name of experts that this package computes
    :raises NotImplementedError: if adapters could change them
    """
    config = get_current_vllm_config_or_none()
    if config is None or config.lora_config is None:
        return
    targets = config.lora_config.target_modules
    if targets is None or prefix.rpartition(".")[2] in targets:
        raise NotImplementedError(
            f"{prefix}: LoRA cannot change experts of this quantization. Leave them out by "
            f"`--lora-target-modules {_ATTENTION}`"
        )


def note_fused(model: Any, names: set[str]):
    """
    :param model: model that vLLM has built
    :param names: Linears on either side of a fused transform, by vLLM's names of them
    """
    setattr(model, _FUSED, names)


def add_lora_check():
    """Let vLLM refuse adapters that do not fit a CAT checkpoint. Others load as before."""
    wrap_function_wrapper(WorkerLoRAManager, "_load_adapter", _load_adapter)


def _load_adapter(load: Callable, manager: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    adapter = load(*args, **kwargs)
    fused: set[str] = getattr(manager._adapter_manager.model, _FUSED, set())
    if wrong := fused & adapter.loras.keys():
        raise ValueError(
            f"The LoRA adapter changes {min(wrong)}, but a transform is fused into the "
            "attention values of this checkpoint, where adapters of the original model do not "
            "fit: make the checkpoint with CATModifier(fuse_attention=False), or the adapter "
            f"without {' and '.join(sorted({name.rpartition('.')[2] for name in fused}))}"
        )
    return adapter
