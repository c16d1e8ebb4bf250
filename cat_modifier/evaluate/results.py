# SPDX-License-Identifier: Apache-2.0
"""Measures of a checkpoint and of the model that it was made from: as a table, and as files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cat_modifier.markdown import markdown_table

__all__ = ["Measure", "TaskResult", "results_table"]


@dataclass(frozen=True)
class Measure:
    """
    One number of a checkpoint, and of its base.

    :param name: name of the measure and of its texts or task
    :param value: number of the checkpoint
    :param error: its standard error; None if not known
    :param base: number of the base; None if there is none
    :param base_error: its standard error; None if not known
    :param higher_is_better: None for numbers that are not compared with a base
    """

    name: str
    value: float
    error: float | None = None
    base: float | None = None
    base_error: float | None = None
    higher_is_better: bool | None = None

    @property
    def recovery(self) -> float | None:
        """Share of the base's quality that the checkpoint has; None if it is not defined"""
        if self.base is None or self.higher_is_better is None:
            return None
        pair = (self.value, self.base) if self.higher_is_better else (self.base, self.value)
        return pair[0] / pair[1] if pair[1] > 0 else None


@dataclass(frozen=True)
class TaskResult:
    """
    Result of one task.

    :param task: name of the task
    :param dataset: id of its dataset on the Hub; None for local files, and for groups
    :param measures: one for each metric, the main one first
    """

    task: str
    dataset: str | None
    measures: list[Measure]


def results_table(results: Sequence[Measure]) -> str:
    """
    Write results as a table in Markdown.

    :return: a row for each measure: base, this checkpoint, recovery in %. Standard errors
        follow +-
    """
    if all(one.base is None for one in results):
        rows = [(one.name, _number(one.value, one.error)) for one in results]
        return markdown_table(("measure", "this"), rows)
    table = []
    for one in results:
        recovery = one.recovery
        table.append(
            (
                one.name,
                "" if one.base is None else _number(one.base, one.base_error),
                _number(one.value, one.error),
                "" if recovery is None else f"{recovery:.1%}",
            )
        )
    return markdown_table(("measure", "base", "this", "recovery"), table)


def _number(value: float, error: float | None) -> str:
    digits = 2 if abs(value) >= 10 else 4
    text = f"{value:.{digits}f}"
    if error is not None and math.isfinite(error):
        text += f" +- {error:.{digits}f}"
    return text
