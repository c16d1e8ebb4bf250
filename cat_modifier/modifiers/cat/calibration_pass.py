# SPDX-License-Identifier: Apache-2.0
"""A calibration pass which runs each layer once"""

from contextlib import ExitStack
from typing import Any

import torch
import tqdm
from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import get_execution_device, get_offloaded_device
from llmcompressor.core import State
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import (
    DisableQuantization,
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)
from torch.nn import Module

__all__ = ["is_resident", "pass_over_data"]


def is_resident(model: Module) -> bool:
    """Whether all of the model is on the device that computes, and nothing is offloaded"""
    main = get_main_device()

    def is_main(device: torch.device | str) -> bool:
        # offloaded to "disk", it is no device
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


def pass_over_data(state: State, batches: list[Any] | None = None):
    """
    Pass the calibration data through the model, for its hooks to see. As llm-compressor's
    pipelines do it, but that attention is the model's own, which is faster.

    :param batches: to pass in place of all the data, without progress
    """
    device = get_execution_device(state.model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for context in (
            disable_cache,
            eval_context,
            disable_hf_kernels,
            disable_lm_head,
            DisableQuantization,
        ):
            stack.enter_context(context(state.model))
        is_quiet = batches is not None or not is_source_process()
        data = state.data.calib if batches is None else batches
        progress = tqdm.tqdm(data, desc="Calibrating", disable=is_quiet)
        for index, batch in enumerate(progress):
            state.current_batch_idx = index
            state.model(**tensors_to_device(batch, device))
