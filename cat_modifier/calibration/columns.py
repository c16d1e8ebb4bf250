# SPDX-License-Identifier: Apache-2.0
"""The texts of a table: of a column of texts, or of a column of chats by a chat template."""

from collections.abc import Collection, Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

__all__ = ["texts_of"]

_TEXT = "text"
"""Usual name of the column of texts"""


def texts_of(
    rows: Any, dataset: str, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Collection[str]:
    """
    Take the texts of a table.

    :param rows: ``datasets.Dataset``
    :param dataset: its name, for messages
    :param column: column with texts or chats. Default: ``text``, or else the first of chats
    :param tokenizer: its chat template makes texts of chats
    :return: texts in the order of the rows. Those of chats are made when they are asked for
    :raises ValueError: if there are no rows, no such column, values of other types, or no
        chat template
    """
    if not len(rows):
        raise ValueError(f"The dataset {dataset!r} is empty: choose another one")
    column = _observe_column(rows, dataset) if column is None else column
    if column not in rows.column_names:
        raise ValueError(
            f"The dataset {dataset!r} has no column {column!r} but {rows.column_names}: choose "
            "one with --column"
        )
    if _is_chat(rows[0][column]):
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError(
                f"Column {column!r} of the dataset {dataset!r} holds chats, but the tokenizer "
                f"has no chat template: choose one of {rows.column_names} that holds text with "
                "--column, or another dataset"
            )
        return _Chats(rows[column], tokenizer, f"column {column!r} of the dataset {dataset!r}")
    texts = list(rows[column])
    if wrong := {type(text).__name__ for text in texts if not isinstance(text, str)}:
        raise ValueError(
            f"Column {column!r} of the dataset {dataset!r} holds values of type "
            f"{', '.join(sorted(wrong))}, not only text: choose another column with --column"
        )
    return texts


class _Chats(Collection[str]):
    """
    Chats as texts. A dataset may hold far more than are used, and templates take time.

    :param chats: lists of messages
    :param tokenizer: holds the chat template
    :param source: column and dataset, for errors
    """

    def __init__(self, chats: Any, tokenizer: PreTrainedTokenizerBase, source: str):
        self._chats, self._tokenizer, self._source = chats, tokenizer, source

    def __iter__(self) -> Iterator[str]:
        for number, chat in enumerate(self._chats):
            try:
                # the template of a window's first chat brings the first special token
                text = str(self._tokenizer.apply_chat_template(chat, tokenize=False))
            except (TemplateError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Row {number} in {self._source} is no chat that the tokenizer's template "
                    f"takes ({error}): choose another column with --column, or another dataset"
                ) from error
            yield text

    def __len__(self) -> int:
        return len(self._chats)

    def __contains__(self, text: object) -> bool:
        return any(text == one for one in self)


def _observe_column(rows: Any, dataset: str) -> str:
    first = rows[0]
    chats = [name for name in rows.column_names if _is_chat(first[name])]
    if isinstance(first.get(_TEXT), str) or (_TEXT in first and not chats):
        return _TEXT
    if chats:
        return chats[0]
    raise ValueError(
        f"The dataset {dataset!r} has neither a column {_TEXT!r} nor one of chats, but "
        f"{rows.column_names}: choose one that holds text with --column"
    )


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of messages"""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)
    )
