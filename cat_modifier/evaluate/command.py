# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier evaluate`: from its arguments to a table and files."""

import gc
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from cat_modifier.auto_model import auto_class, load_model, read_config
from cat_modifier.calibration.texts import HELD_OUT_SPLITS, load_texts, windows
from cat_modifier.evaluate.files import write_entries, write_json
from cat_modifier.evaluate.results import Measure, TaskResult, results_table
from cat_modifier.evaluate.texts import measure_texts
from cat_modifier.hub.card import update_evaluation
from cat_modifier.hub.libraries import library_versions
from cat_modifier.model_path import public_name

__all__ = ["run"]


def run(
    checkpoint: str,
    base: str | None,
    dataset: str,
    split: str | None,
    column: str | None,
    samples: int,
    length: int,
    tasks: str,
    model: str,
    model_args: str,
    include_path: Path | None,
    limit: int | None,
    output: Path | None,
):
    """
    Run `cat-modifier evaluate`; see its help for the parameters.

    :raises ValueError: if the arguments do not fit each other, the model or the data
    :raises OSError: if a file cannot be read or written
    """
    names = [name for name in map(str.strip, tasks.split(",")) if name]
    if not samples and not names:
        raise ValueError("There is nothing to evaluate: name --tasks, or raise --samples")
    if output is not None and not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder for {output}")
    for one in filter(None, (checkpoint, base)):
        auto_class(read_config(one))

    if re.search(r"(^|,)\s*pretrained\s*=", model_args):
        raise ValueError("--model-args cannot name another model than CHECKPOINT")

    chosen = None
    if names:  # before hours of other work
        from cat_modifier.evaluate.tasks import Tasks, evaluate_tasks

        chosen = Tasks(names, include_path)
    measures: list[Measure] = []
    settings: dict[str, Any] = {"checkpoint": checkpoint, "base": base}
    if samples:
        ids, measures = _measure_texts(
            checkpoint, base, dataset, split, column, samples, length
        )
        settings |= {"dataset": dataset, "windows": ids.shape[0], "length": ids.shape[1]}
        gc.collect()  # memory of the models, before others are loaded
        torch.cuda.empty_cache()
    results: list[TaskResult] = []
    if chosen is not None:
        results = evaluate_tasks(checkpoint, base, chosen, model, model_args, limit)
        settings |= {"tasks": names, "model": model, "model_args": model_args, "limit": limit}
    of_tasks = [measure for result in results for measure in result.measures]
    print(results_table(measures + of_tasks))

    versions = library_versions()
    if output is not None:
        write_json(output, settings | {"versions": versions}, measures + of_tasks)
    if not Path(checkpoint).is_dir():
        return
    made_with = ", ".join(f"{name} {number}" for name, number in versions.items())
    if base is not None:
        made_with = f"base: {public_name(base)}; {made_with}"
    if measures:
        conditions = f"{settings['windows']} windows of {settings['length']} tokens"
        table = results_table(measures)
        update_evaluation(Path(checkpoint), "texts", table, f"{conditions}; {made_with}")
    if of_tasks:
        conditions = f"--model {model}"
        if limit is not None:
            conditions += f", of {limit} samples of each task only (--limit)"
        table = results_table(of_tasks)
        update_evaluation(Path(checkpoint), "tasks", table, f"{conditions}; {made_with}")
        if limit is None:
            write_entries(Path(checkpoint), results, f"{conditions}; {made_with}")


def _measure_texts(
    checkpoint: str,
    base: str | None,
    dataset: str,
    split: str | None,
    column: str | None,
    samples: int,
    length: int,
) -> tuple[Tensor, list[Measure]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = load_texts(dataset, split or HELD_OUT_SPLITS, column, tokenizer)
    ids = windows(texts, tokenizer, length, samples)
    original = None if base is None else load_model(base, read_config(base))
    quantized = load_model(checkpoint, read_config(checkpoint))
    return ids, measure_texts(quantized, original, ids, public_name(dataset))
