# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier quantize`: from its arguments to a checkpoint."""

import shlex
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from datasets import Dataset, DatasetInfo
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from transformers import PreTrainedModel

import cat_modifier
from cat_modifier.auto_model import auto_class, load_model, load_processor, read_config
from cat_modifier.calibration.texts import CALIBRATION_SPLITS, hub_id, load_texts, windows
from cat_modifier.checkpoint.size import weight_bytes
from cat_modifier.hub.run_record import RunRecord, note_command
from cat_modifier.model_path import public_name
from cat_modifier.modifiers.cat.base import CATModifier
from cat_modifier.quantize.outline import outline, outline_table
from cat_modifier.quantize.sizes import stored_bytes
from cat_modifier.quantize.summary import summary

__all__ = ["run"]


def run(
    model: str,
    recipe: str,
    output: Path | None,
    dataset: str,
    split: str | None,
    column: str | None,
    samples: int,
    length: int,
    overwrite: bool,
    dry_run: bool,
):
    """
    Run `cat-modifier quantize`; see its help for the parameters.

    :raises ValueError: if the arguments do not fit each other, the model or the data
    :raises OSError: if a file cannot be read or written
    """
    # check all that can be checked before a model is loaded
    path = find_recipe(recipe)
    if not dry_run:
        output = _check_output(output, overwrite, model)
    config = read_config(model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantized: name the model that it was made from")
    auto_class(config)
    if dry_run:
        print(outline_table(outline(config, path)))
        return
    assert output is not None

    processor = load_processor(model, config)
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = load_texts(dataset, split or CALIBRATION_SPLITS, column, tokenizer)
    ids = windows(texts, tokenizer, length, samples)
    # before the work of hours: an error if the folder cannot be written to
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=output):
        pass
    loaded = load_model(model, config)
    note_command(
        loaded,
        command_line(model, recipe, output, dataset, split, column, samples, length),
    )
    before = stored_bytes(loaded.state_dict(keep_vars=True))
    started = time.monotonic()
    _oneshot(loaded, processor, path, calibration_data(ids, dataset), output)
    minutes = (time.monotonic() - started) / 60
    print(summary(model, output, before, weight_bytes(output), minutes, RunRecord.of(loaded)))


def command_line(
    model: str,
    recipe: str,
    output: Path,
    dataset: str,
    split: str | None,
    column: str | None,
    samples: int,
    length: int,
) -> str:
    """Write the command for the model card: all options, and paths without their folders"""
    options = {
        "recipe": public_name(recipe),
        "output": output.resolve().name,
        "dataset": public_name(dataset),
        "split": split,
        "column": column,
        "samples": samples,
        "length": length,
    }
    words = ["cat-modifier", "quantize", public_name(model)]
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def find_recipe(name: str) -> str:
    """
    Find a recipe by its name, or the name of a YAML file.

    :raises OSError: if there is no such file
    :raises ValueError: if there is no such recipe
    """
    if Path(name).is_file():
        return name
    if Path(name).suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"There is no file {name}")
    return cat_modifier.recipe(name)


def _check_output(output: Path | None, overwrite: bool, model: str) -> Path:
    if output is None:
        raise ValueError("A folder for the checkpoint is missing: name one with --output")
    if output.resolve() == Path(model).resolve():
        raise ValueError(
            f"{output} holds the model itself, which would be lost: choose another --output"
        )
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file: name a folder with --output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{output} is not empty: choose another folder, or add --overwrite to replace the "
            "checkpoint in it"
        )
    return output


def calibration_data(ids: torch.Tensor, dataset: str) -> Dataset:
    """
    Make a dataset of windows of tokens.

    :param ids: token ids, shape (windows, length)
    :param dataset: name of the texts. An id of the Hub is kept, for the model card
    """
    info = DatasetInfo()
    if (repo := hub_id(dataset)) is not None:
        # as in a dataset that was loaded from there
        info.download_checksums = {f"hf://datasets/{repo}@main": {}}
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    return Dataset.from_dict(columns, info=info)


def _oneshot(model: PreTrainedModel, processor: Any, recipe: str, data: Dataset, output: Path):
    oneshot(
        model=model,
        processor=processor,
        recipe=recipe,
        dataset=data,
        num_calibration_samples=len(data),
        max_seq_length=len(data[0]["input_ids"]),
        shuffle_calibration_samples=False,
        # a limit counts the tokens that are routed to an expert
        moe_calibrate_all_experts=not _limits_overhead(recipe),
        output_dir=str(output),
    )


def _limits_overhead(recipe: str) -> bool:
    """Whether a recipe sets `max_overhead`, a limit for the multiply-adds of transforms"""
    return any(
        isinstance(one, CATModifier) and one.max_overhead is not None
        for one in Recipe.create_instance(recipe).modifiers
    )
