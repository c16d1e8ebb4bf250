# SPDX-License-Identifier: Apache-2.0
"""
The choice of the pipeline that passes calibration data through the model.

Transforms leave the function of a model as it is, so that there is no error to propagate
from layer to layer: the sequential pipeline would run each layer twice for nothing, and
needs a model that can be traced. Where the model is on the device that computes,
:class:`SinglePassPipeline` passes the data through it once. llm-compressor infers a pipeline
from `requires_calibration_data` alone; :func:`register` adds `prefers_single_pass`.
"""

from typing import TYPE_CHECKING, Any

import torch
import tqdm
from compressed_tensors.offload import get_execution_device, get_offloaded_device
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils.dev import get_main_device
from torch.nn import Module
from torch.utils.data import DataLoader

from cat_modifier.modifiers.forward import as_it_is_run

if TYPE_CHECKING:
    from llmcompressor.args.dataset_arguments import DatasetArguments

__all__ = ["SinglePassPipeline", "is_resident", "register"]


class SinglePassPipeline(CalibrationPipeline):
    """
    One pass of the data through the whole model.

    llm-compressor's basic pipeline does the same with eager attention, which takes longer,
    and with an lm_head on another device, which some models cannot add their bias to.
    """

    @staticmethod
    def __call__(model: Module, dataloader: DataLoader, dataset_args: "DatasetArguments"):
        state = active_session().state
        device = get_execution_device(model)
        LifecycleCallbacks.calibration_start()
        with as_it_is_run(model):
            batch: Any
            for index, batch in enumerate(tqdm.tqdm(dataloader, desc="Calibrating")):
                state.current_batch_idx = index
                batch = tensors_to_device(batch, device)
                model(**batch)
            LifecycleCallbacks.sequential_epoch_end(list(model.modules()))
            LifecycleCallbacks.calibration_end()


def register():
    """
    Let llm-compressor infer the single pass for modifiers with `prefers_single_pass`. Safe
    to call again.

    Does nothing if a later llm-compressor infers pipelines in another way: the modifiers then
    run in the sequential pipeline.
    """
    infer = getattr(CalibrationPipeline, "_infer_pipeline", None)
    if infer is None or hasattr(infer, "infers_single_pass"):
        return
    CalibrationPipeline.register_value(SinglePassPipeline, name="single_pass")

    def infer_pipeline(modifiers: list[Modifier]) -> str:
        preferences = [getattr(one, "prefers_single_pass", False) for one in modifiers]
        if preferences and all(preferences):
            return "single_pass"
        return infer(modifiers)

    infer_pipeline.infers_single_pass = True  # type: ignore[attr-defined]
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
