# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval."""

import gc
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from cat_modifier.evaluate.results import Measure, TaskResult

__all__ = ["Tasks", "evaluate_tasks"]

_LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names of dataset loaders, which lm-eval gives as the dataset of files"""


class Tasks:
    """
    Tasks to evaluate.

    :param patterns: names of tasks, groups or tags; of tasks alone, `*` stands for any part
    :param include_path: folder with tasks beside those of lm-eval; None for none
    :raises ValueError: if there is no such task

    Attributes:
        names: tasks, groups and tags that match
        manager: knows how to load them
    """

    def __init__(self, patterns: Sequence[str], include_path: Path | None):
        path = None if include_path is None else str(include_path)
        self.manager = TaskManager(include_path=path)
        found = {pattern: self._match(pattern) for pattern in patterns}
        if unknown := [pattern for pattern, names in found.items() if not names]:
            raise ValueError(
                f"lm-eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them; "
                "--include-path adds a folder of yours"
            )
        self.names = list(dict.fromkeys(chain.from_iterable(found.values())))

    def _match(self, pattern: str) -> list[str]:
        names = self.manager.match_tasks([pattern])
        # lm-eval refuses a group together with its members
        tasks = set(self.manager.all_subtasks)
        return [name for name in names if name == pattern or name in tasks]


def evaluate_tasks(
    checkpoint: str,
    base: str | None,
    tasks: Tasks,
    engine: str,
    arguments: str,
    limit: int | None,
) -> list[TaskResult]:
    """
    Evaluate a checkpoint and its base, one after the other.

    :param engine: `hf` or `vllm`
    :param arguments: further arguments of lm-eval's model, as `max_model_len=2048`
    :param limit: samples of each task, at most; None for all
    """
    device = None
    if engine == "hf":  # lm-eval's default is CUDA, also where there is none
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def evaluate(model: str) -> dict[str, Any]:
        found = simple_evaluate(
            model=engine,
            model_args={"pretrained": model} | simple_parse_args_string(arguments),
            tasks=tasks.names,
            limit=limit,
            device=device,
            task_manager=tasks.manager,
            log_samples=False,
        )
        gc.collect()  # memory of the model, before the next one is loaded
        return dict(found or {})

    before = None if base is None else evaluate(base)
    return _collect(evaluate(checkpoint), before, tasks.names)


def _collect(
    found: dict[str, Any], before: dict[str, Any] | None, tasks: Sequence[str]
) -> list[TaskResult]:
    # members of a group are left out if the group has a number; a tag has none
    members = {
        name
        for group, inside in found.get("group_subtasks", {}).items()
        if any(_is_metric(*one) for one in found["results"].get(group, {}).items())
        for name in inside
    }
    names = [name for name in found["results"] if name in tasks or name not in members]
    results = []
    for name in names:
        numbers = found["results"][name]
        base = None if before is None else before["results"][name]
        better = found.get("higher_is_better", {}).get(name, {})
        path = found.get("configs", {}).get(name, {}).get("dataset_path")
        measures = [
            _measure(name, key, numbers, base, better)
            for key, value in numbers.items()
            if _is_metric(key, value)
        ]
        results.append(TaskResult(name, _hub_id(path), measures))
    return results


def _hub_id(path: str | None) -> str | None:
    """
    :param path: path or id that lm-eval loads the dataset of a task from
    :return: id of a dataset on the Hub; None for files
    """
    if path is None or path in _LOADERS or path.endswith(".py") or Path(path).exists():
        return None
    return path if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) else None


def _is_metric(key: str, value: Any) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr") and isinstance(value, int | float)


def _measure(
    task: str,
    key: str,
    numbers: dict[str, Any],
    base: dict[str, Any] | None,
    better: dict[str, bool],
) -> Measure:
    """
    :param key: metric and filter, as lm-eval joins them
    :param numbers: metrics of the checkpoint
    :param base: metrics of its base
    :param better: whether higher is better, by metric
    """
    metric, _, kind = key.partition(",")
    error = f"{metric}_stderr,{kind}"
    return Measure(
        f"{task}, {metric}" + ("" if kind == "none" else f" ({kind})"),
        float(numbers[key]),
        _float(numbers.get(error)),
        None if base is None else float(base[key]),
        None if base is None else _float(base.get(error)),
        better.get(metric),
    )


def _float(value: Any) -> float | None:
    """lm-eval writes N/A for errors that it does not know"""
    return float(value) if isinstance(value, int | float) else None
