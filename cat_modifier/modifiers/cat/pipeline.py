# SPDX-License-Identifier: Apache-2.0
"""
The choice of the pipeline that passes calibration data through the model.

Transforms leave the function of a model as it is, so that there is no error to propagate
from layer to layer: the sequential pipeline would run each layer twice for nothing, and
needs a model that can be traced. Where the model is on the device that computes,
:class:`SinglePassPipeline` passes the data through it once. llm-compressor infers a pipeline
from `requires_calibration_data` alone; :func:`register` adds `prefers_single_pass`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import tqdm
from compressed_tensors.offload import get_execution_device, get_offloaded_device
from compressed_tensors.quantization import disable_quantization, enable_quantization
from compressed_tensors.utils import patch_attr
from llmcompressor.core import LifecycleCallbacks, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import disable_cache, disable_hf_kernels, eval_context
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from llmcompressor.args.dataset_arguments import DatasetArguments

__all__ = [
    "SinglePassPipeline",
    "as_it_is_run",
    "is_resident",
    "register",
    "run_batch",
    "unquantized",
]


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


@contextmanager
def as_it_is_run(model: Module) -> Iterator[None]:
    """
    Context to run a model in without gradients, caches, quantization, and the product of its
    lm_head.
    """
    with unquantized(model), _without_lm_head(model), torch.no_grad():
        yield


@contextmanager
def unquantized(model: Module) -> Iterator[None]:
    """Context to run a model in without caches, dropout and quantization"""
    # may be called inside a context of llm-compressor that has disabled it already
    quantized = [one for one in model.modules() if getattr(one, "quantization_enabled", False)]
    with ExitStack() as stack:
        for context in (disable_cache, eval_context, disable_hf_kernels):
            stack.enter_context(context(model))
        for module in quantized:
            disable_quantization(module)
            stack.callback(enable_quantization, module)
        yield


@contextmanager
def _without_lm_head(model: Module) -> Iterator[None]:
    """Replace logits by zeros that take no memory; hooks still see the inputs"""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, Linear):
        yield
        return

    def zeros(x: Tensor) -> Tensor:
        return x.new_zeros(1).expand(*x.shape[:-1], head.out_features)

    with patch_attr(head, "forward", zeros):
        yield


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


def run_batch(state: State, batch: Any):
    """
    Pass one batch through the model.

    :param batch: keyword arguments of the model
    """
    batch = tensors_to_device(batch, get_execution_device(state.model))
    with as_it_is_run(state.model):
        state.model(**batch)
