# SPDX-License-Identifier: Apache-2.0
"""
Writing a checkpoint so that a folder either holds all of it or does not load.

Everything is written to a staging folder inside the target first. Only when it is
complete and on disk are its files moved into place, ``config.json`` last: without it no
reader loads the folder. Whatever happens before that leaves an older checkpoint as it was.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch.distributed as dist
from compressed_tensors.distributed import is_distributed, is_source_process
from compressed_tensors.quantization.utils import is_module_quantized
from loguru import logger
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from cat_modifier.checkpoint.schema import TENSOR_SUFFIX, mark_quantization_config

__all__ = ["check_tensor_names", "find_transforms", "save_atomically"]

_STAGING_NAME = ".incomplete"


def save_atomically(model: PreTrainedModel):
    """
    Wrap ``model.save_pretrained`` so that it writes a marked CAT checkpoint atomically.

    :param model: with CAT transforms attached
    """
    save_method = model.save_pretrained

    @wraps(save_method)
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        if kwargs.get("push_to_hub"):
            # it would upload the staging folder, and before it is marked
            raise ValueError(
                "`push_to_hub=True` is not supported by CAT checkpoints: call "
                "`model.push_to_hub(repo_id)` instead"
            )
        if not any(is_module_quantized(module) for module in self.modules()):
            raise ValueError(
                "The model has CAT transforms, but nothing is quantized: add a "
                "QuantizationModifier or a GPTQModifier to the recipe after CATModifier"
            )
        with _atomic_folder(save_directory) as staging:
            save_method(str(staging), **kwargs)
            if is_source_process():
                _edit_quantization_config(staging, mark_quantization_config)

    # a method, which llm-compressor can wrap in turn
    model.save_pretrained = MethodType(save_pretrained, model)


@contextmanager
def _atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Context in which a checkpoint is written to the yielded staging folder; it is moved to
    ``folder`` at the end, and thrown away on an error. In a distributed run all ranks
    enter, and the source process alone touches the disk.

    :param folder: where the checkpoint is to be; may exist and hold an older one
    """
    folder = Path(folder)
    staging = folder / _STAGING_NAME
    if is_source_process():
        shutil.rmtree(staging, ignore_errors=True)  # of an earlier, killed save
        staging.mkdir(parents=True)
    try:
        yield staging
        if is_source_process():
            _replace(folder, staging)
            logger.info(f"The checkpoint is in {folder}")
        if is_distributed():
            dist.barrier()  # no rank may look for the checkpoint before it is there
    finally:
        if is_source_process():
            shutil.rmtree(staging, ignore_errors=True)


def _replace(folder: Path, staging: Path):
    """Move all files of the staging folder into the folder, the config last"""
    for path in staging.rglob("*"):
        _sync(path)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    _sync(folder)
    # weights of an older checkpoint with other shards would be dead weight
    for path in [*folder.glob("model*.safetensors"), folder / SAFE_WEIGHTS_INDEX_NAME]:
        path.unlink(missing_ok=True)
    # safetensors makes files which their owner alone can read
    mode = (staging / CONFIG_NAME).stat().st_mode
    for path in staging.glob("*.safetensors"):
        path.chmod(mode)
    paths = [path for path in staging.iterdir() if path.name != CONFIG_NAME]
    for path in [*paths, staging / CONFIG_NAME]:
        target = folder / path.name
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        path.replace(target)
        _sync(folder)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _edit_quantization_config(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]):
    """
    Edit the ``quantization_config`` of the ``config.json`` in a folder.

    :param edit: from the old quantization config to the new one
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    if "quantization_config" not in config:
        raise ValueError(
            "The model has CAT transforms, but its quantization config was removed, as "
            "`dequantize=True` does: it cannot be saved without losing its transforms"
        )
    config["quantization_config"] = edit(config["quantization_config"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def find_transforms(files: list[str]) -> dict[str, tuple[int, ...]]:
    """
    :param files: safetensors files of a checkpoint
    :return: shapes of all transform tensors in them, by name
    """
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                if name.endswith(TENSOR_SUFFIX):
                    found[name] = tuple(tensors.get_slice(name).get_shape())
    return found


def check_tensor_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]):
    """
    :param found: shapes of the transform tensors of a checkpoint, by name
    :param expected: those which its config promises
    :raises ValueError: if any is missing, unexpected, or of another shape
    """
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"Transform tensor {name} is missing from the checkpoint")
        if name not in expected:
            raise ValueError(
                f"The checkpoint holds the transform tensor {name}, of which its "
                "transform_config knows nothing"
            )
        if found[name] != expected[name]:
            raise ValueError(
                f"Transform tensor {name} has shape {found[name]}, but the model needs "
                f"{expected[name]}"
            )
