# SPDX-License-Identifier: Apache-2.0
"""
The choice of the pipeline that passes calibration data through the model.

Transforms keep the function of a model, so that no errors propagate from layer to layer. The
sequential pipeline would run each layer twice in vain, and needs a model that can be traced.
The basic pipeline passes the data through the model once. It suits models that are on the
device that computes. llm-compressor infers a pipeline from `requires_calibration_data` alone;
:func:`register` adds `prefers_basic_pipeline`.
"""

from typing import Any

import torch
from compressed_tensors.offload import get_execution_device, get_offloaded_device
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from torch.nn import Module

__all__ = ["is_resident", "register", "run_batch"]


def register():
    """
    Let llm-compressor infer the basic pipeline for modifiers with `prefers_basic_pipeline`.
    Safe to call again.

    Does nothing if a later llm-compressor infers pipelines in another way: the modifiers then
    run in the sequential pipeline.
    """
    infer = getattr(CalibrationPipeline, "_infer_pipeline", None)
    if infer is None or hasattr(infer, "infers_basic"):
        return

    def infer_pipeline(modifiers: list[Modifier]) -> str:
        if all(getattr(one, "prefers_basic_pipeline", False) for one in modifiers):
            return "basic"
        return infer(modifiers)

    infer_pipeline.infers_basic = True  # type: ignore[attr-defined]
    CalibrationPipeline._infer_pipeline = staticmethod(infer_pipeline)  # type: ignore[method-assign]


def is_resident(model: Module) -> bool:
    """Whether the whole model is on the device that computes, without offloading"""
    main = get_main_device()

    def is_main(device: torch.device | str) -> bool:
        # a module offloaded to "disk" has no device
        return (
            isinstance(device, torch.device)
            and device.type == main.type
            and device.index in (main.index, None)
        )

    return all(
        is_main(get_offloaded_device(module))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    )


def run_batch(state: State, batch: Any):
    """
    Pass one batch through the model, like llm-compressor's pipelines.

    :param batch: keyword arguments of the model
    """
    batch = tensors_to_device(batch, get_execution_device(state.model))
    with calibration_forward_context(state.model), DisableQuantization(state.model):
        state.model(**batch)
