# SPDX-License-Identifier: Apache-2.0
"""Results in files: one of JSON, and those from which the Hub shows the results of a model."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from cat_modifier.evaluate.results import Measure, TaskResult

__all__ = ["write_entries", "write_json"]

_FOLDER = ".eval_results"
"""Folder of a repository in which the Hub looks for results"""


def write_json(file: Path, settings: Mapping[str, Any], measures: Iterable[Measure]):
    """
    Write all numbers and what they were measured with.

    :param settings: anything that JSON holds
    """
    rows = [asdict(one) | {"recovery": one.recovery} for one in measures]
    file.write_text(json.dumps({**settings, "measures": rows}, indent=2) + "\n")


def write_entries(checkpoint: Path, results: Iterable[TaskResult], notes: str):
    """
    Write a file for each task with a dataset on the Hub, which knows no others, into the
    folder of a checkpoint.

    The Hub has one number for a task: the first metric. Files of other tasks stay.

    :param notes: how it was measured
    """
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    for one in results:
        if not one.measures or one.dataset is None:
            continue
        main = one.measures[0]
        entry = EvalResultEntry(
            dataset_id=one.dataset,
            task_id=one.task,
            value=main.value,
            date=now,
            notes=f"{main.name}; {notes}",
        )
        folder = checkpoint / _FOLDER
        folder.mkdir(exist_ok=True)
        name = re.sub(r"[^\w.-]+", "_", one.task)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        (folder / f"{name}.yaml").write_text(text)
