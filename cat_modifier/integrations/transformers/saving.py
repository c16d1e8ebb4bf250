# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained`` of a model with CAT transforms."""

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import torch.distributed as dist
from compressed_tensors.distributed import is_distributed, is_source_process
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import patch_attr
from loguru import logger
from torch import Tensor
from torch.nn import Linear, Module
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from cat_modifier.checkpoint.digest import write_digests
from cat_modifier.checkpoint.schema import mark_quantization_config
from cat_modifier.checkpoint.transform_module import CATTransform
from cat_modifier.checkpoint.verify import unknown_files, write_sums
from cat_modifier.hub.card import write_card
from cat_modifier.integrations.transformers.atomic_folder import (
    UnfinishedSaveError,
    atomic_folder,
    holds_weights,
)
from cat_modifier.integrations.transformers.conversions import with_whole_transforms

__all__ = [
    "changing",
    "check_complete",
    "mark_complete",
    "mark_incomplete",
    "save_atomically",
    "saved_together",
]

_INCOMPLETE = "_cat_is_incomplete"
_PROCESSOR = "_cat_processor"

_WAITING = timedelta(hours=3)
"""For how long ranks wait until one has written, as in llm-compressor"""

_CONVERSIONS = "_weight_conversions"
"""Attribute of a model: what Transformers' loader applied to its tensors, and undoes to save"""


def save_atomically(model: PreTrainedModel):
    """
    Wrap ``model.save_pretrained`` so that it writes a marked CAT checkpoint atomically.

    Safe to call again.

    :param model: model with CAT transforms
    """
    method = model.save_pretrained
    if getattr(method, "_writes_cat", False):
        return
    function = getattr(method, "__func__", None)

    @wraps(method)
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        # a copy of the model has its own weights
        save = method if function is None else MethodType(function, self)
        options = _name_arguments(self, save_directory, args, kwargs)
        _check(self, options)
        with _waiting_ranks(), _merged_transforms(self):
            if is_source_process() and options.get("is_main_process", True):
                _save(self, save, Path(save_directory), options)
            else:  # helps to gather the weights, and keeps no file
                with TemporaryDirectory() as scratch:
                    save(scratch, **options)

    # llm-compressor leaves a method alone that is "overridden"; around ours it would write a
    # config that is not marked
    vars(save_pretrained).update(_writes_cat=True, _overridden=True)
    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]


@contextmanager
def saved_together(model: Module, processor: Any) -> Iterator[None]:
    """
    Context in which a processor is a part of the checkpoint: a kill leaves both or none.

    :param processor: tokenizer or processor of the model
    """
    with patch_attr(model, _PROCESSOR, processor):
        yield


def _save(model: PreTrainedModel, save: Any, target: Path, options: dict[str, Any]):
    """
    Write a marked checkpoint.

    :param save: writes one that is not marked into a folder
    :param options: its arguments
    """
    with atomic_folder(target) as staging:
        try:
            save(str(staging), **options)
            if (processor := getattr(model, _PROCESSOR, None)) is not None:
                processor.save_pretrained(str(staging))
        except Exception as error:
            if not holds_weights(staging):
                raise
            # a recipe or code that cannot be written is no reason to lose hours
            _edit_config(model, staging)
            raise UnfinishedSaveError(
                "All weights are written, but not all that belongs to the "
                f"checkpoint: {type(error).__name__}: {error}. Files of "
                f"{target} are as they were. The new ones are in {staging} "
                "until the next save to this folder: save again, or move them to "
                "where you need them"
            ) from error
        _edit_config(model, staging)
        if (staging / CONFIG_NAME).exists():  # an adapter has none
            write_card(staging, target, model)
    logger.info(f"The checkpoint is in {target}")
    if others := unknown_files(target):
        logger.warning(
            f"{target} holds weights that are not of this checkpoint, and that vLLM would load "
            f"with it: move {', '.join(others)} to another folder"
        )


@contextmanager
def _waiting_ranks() -> Iterator[None]:
    """Let all ranks wait for the last: none may look for the checkpoint before it is there"""
    if not is_distributed():
        yield
        return
    # the hashes of a large checkpoint take longer than ranks wait by default
    group = dist.new_group(backend="gloo", timeout=_WAITING)
    try:
        yield
    finally:
        dist.barrier(group=group)
        dist.destroy_process_group(group)


def mark_incomplete(model: Module):
    """Refuse to save a model until :func:`mark_complete`: its weights are being transformed"""
    setattr(model, _INCOMPLETE, True)


def mark_complete(model: Module):
    """Allow a model to be saved"""
    if hasattr(model, _INCOMPLETE):
        delattr(model, _INCOMPLETE)


@contextmanager
def changing(model: Module) -> Iterator[None]:
    """Refuse to save a model if an error ends the context: a part of it may be changed"""
    mark_incomplete(model)
    yield
    mark_complete(model)


def check_complete(model: Module):
    """
    :raises ValueError: if a run has transformed a part of the model alone
    """
    if hasattr(model, _INCOMPLETE):
        raise ValueError(
            "A modifier did not finish: only a part of the model is transformed. Remove the "
            "cause of its error, load the original model again, and repeat the run"
        )


def _name_arguments(
    model: PreTrainedModel, save_directory: str | os.PathLike, args: tuple, kwargs: dict
) -> dict[str, Any]:
    """
    Name the arguments of a call of ``save_pretrained``.

    llm-compressor's wrapper has other positional arguments than Transformers' method.
    """
    signature = inspect.signature(type(model).save_pretrained)
    bound = signature.bind(model, save_directory, *args, **kwargs)
    named = {name: value for name, value in bound.arguments.items() if name != "kwargs"}
    return dict(list(named.items())[2:]) | bound.arguments.get("kwargs", {})


def _check(model: PreTrainedModel, options: dict[str, Any]):
    """
    Check that a checkpoint can be made of a model.

    :param options: arguments of ``save_pretrained``
    :raises ValueError: if it cannot
    """
    check_complete(model)
    if options.get("push_to_hub"):
        # it would upload the staging folder, and before it is marked
        raise ValueError(
            "`push_to_hub=True` is not supported by CAT checkpoints: save to a folder, then "
            "run `cat-modifier push FOLDER REPO`"
        )
    if options.get("distributed_checkpoint"):
        raise ValueError("`distributed_checkpoint=True` is not supported by CAT checkpoints")
    if options.get("variant"):
        # vLLM would load the files of all variants in a folder, one after the other
        raise ValueError(
            "`variant` is not supported by CAT checkpoints: save to a folder of its own"
        )
    if not any(is_module_quantized(module) for module in model.modules()):
        raise ValueError(
            "The model has CAT transforms, but nothing is quantized: add a "
            "QuantizationModifier or a GPTQModifier to the recipe after CATModifier"
        )


@contextmanager
def _merged_transforms(model: PreTrainedModel) -> Iterator[None]:
    """Save transforms beside the Linears that Transformers merges while it saves"""
    conversions = vars(model).get(_CONVERSIONS)
    if conversions is None:
        yield
        return
    setattr(model, _CONVERSIONS, with_whole_transforms(conversions, _stored_transforms(model)))
    try:
        yield
    finally:
        setattr(model, _CONVERSIONS, conversions)


def _edit_config(model: PreTrainedModel, folder: Path):
    """
    Edit the ``quantization_config`` of a checkpoint that was just written.

    Mark it, write its digests and those of its transforms, and add all Linears that are not
    quantized to `ignore`, by their names in the model. compressed-tensors lists them by their
    names in the files, which differ for some models, and leaves out subclasses of Linear: a
    reader would then take them for quantized. A quantized lm_head is no longer tied.

    :param folder: holds the checkpoint, or an adapter, which has no config
    :raises ValueError: if there are no weights, or if the transforms are lost
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError("Nothing was saved: `state_dict` is empty")
    path = folder / CONFIG_NAME
    if not path.exists():
        return
    config = json.loads(path.read_text())
    if "quantization_config" not in config:
        raise ValueError(
            "The model has CAT transforms, but its quantization config was removed, as "
            "`dequantize=True` does: it cannot be saved without losing its transforms"
        )
    quantization = config["quantization_config"]
    ignore = quantization.get("ignore") or []
    others = [name for name in _unquantized(model) if name not in ignore]
    quantization["ignore"] = [*ignore, *others]
    write_digests(quantization["transform_config"], _stored_transforms(model))
    config["quantization_config"] = mark_quantization_config(quantization)
    head = model.get_output_embeddings()
    if head is not None and is_module_quantized(head):
        # llm-compressor unties it, and notes that in one of two places, or none
        for one in (config, config.get("text_config")):
            if one is not None:
                one["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_sums(folder)


def _stored_transforms(model: PreTrainedModel) -> dict[str, Tensor]:
    """Find the blocks of all transforms, by the Linear that holds them"""
    return {
        module.args.targets[0]: module.weight
        for module in model.modules()
        if isinstance(module, CATTransform) and module.weight is not None
    }


def _unquantized(model: PreTrainedModel) -> list[str]:
    """List the Linears that are not quantized, and modules of a class of which others are"""
    modules = dict(model.named_modules())
    quantized = {type(module) for module in modules.values() if is_module_quantized(module)}
    quantized.add(Linear)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, tuple(quantized)) and not is_module_quantized(module)
    ]
