# SPDX-License-Identifier: Apache-2.0
"""Texts to calibrate and to evaluate on, as windows of tokens."""

import pydoc_data.topics
import random
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "MIXED", "load_texts", "windows"]

EMBEDDED = "pydoc-topics"
"""English text of the Python installation: 150 kB, no download"""

MIXED = "python-mixed"
"""
Text of several kinds that every Python installation has: its documentation, the READMEs and
licences of the installed packages, and the code of the standard library. No download; which
READMEs and licences there are depends on the environment
"""

_LONGEST = 6000
"""Characters that are taken of one text, so that a window of tokens has few texts"""

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffixes to loaders of the datasets library"""


def load_texts(dataset: str, split: str, column: str = "text") -> list[str]:
    """
    Read texts to calibrate or evaluate on.

    :param dataset: ``pydoc-topics`` or ``python-mixed``; a text file (.txt, .md); a file with
        a column of texts (.json, .jsonl, .csv, .parquet); or a dataset of the Hugging Face Hub,
        ``id`` or ``id:configuration``
    :param split: split of a dataset of the Hub, see ``datasets.load_dataset``. The
        ``train`` split of pydoc-topics is one half of the topics, any other split the other
        half; so with each kind of python-mixed. Files have no splits
    :param column: column with the texts
    :raises ValueError: if the dataset cannot be read
    """
    if dataset == EMBEDDED:
        return _half(_topics(), split)
    if dataset == MIXED:
        topics = list(dict.fromkeys(_topics()))  # two of them have one text
        kinds = [_half(kind, split) for kind in (topics, _readmes(), _licences(), _code())]
        for kind in kinds:
            random.Random(0).shuffle(kind)
        # equal shares, also of the first few
        return [text[:_LONGEST] for texts in zip(*kinds, strict=False) for text in texts]

    from datasets import load_dataset

    path = Path(dataset)
    try:
        if path.suffix in (".txt", ".md"):
            return [path.read_text()]
        if path.suffix in _READERS:
            rows = load_dataset(_READERS[path.suffix], data_files=dataset, split="train")
        else:
            name, _, configuration = dataset.partition(":")
            rows = load_dataset(name, configuration or None, split=split)
    except Exception as error:  # readers of all kinds, and the network
        raise ValueError(
            f"The dataset {dataset!r} (split {split!r}) cannot be read: {error}"
        ) from error
    if column not in rows.column_names:
        raise ValueError(
            f"The dataset {dataset!r} has no column {column!r} but {rows.column_names}: choose "
            "one with --column"
        )
    texts = list(rows[column])
    if wrong := {type(text).__name__ for text in texts if not isinstance(text, str)}:
        raise ValueError(
            f"Column {column!r} of the dataset {dataset!r} holds values of type "
            f"{', '.join(sorted(wrong))}, not only text: choose another column with --column"
        )
    return texts


def windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> Tensor:
    """
    Cut texts into windows of tokens, without padding.

    :param texts: texts, to be joined
    :param length: tokens per window
    :param count: upper bound of the number of windows
    :return: token ids, shape (windows, length), int64
    :raises ValueError: if the texts do not fill one window
    """
    ids, end = [], length * count
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(ids) >= end:
            break
    found = min(len(ids) // length, count)
    if found == 0:
        raise ValueError(
            f"The texts have {len(ids)} tokens, too few for one window of {length}: use more "
            "text or shorter windows"
        )
    if found < count:
        logger.info(f"The texts fill {found} windows of {length} tokens, not {count}")
    return torch.tensor(ids[: found * length]).view(found, length)


def _half(texts: list[str], split: str) -> list[str]:
    middle = len(texts) // 2
    return texts[:middle] if split == "train" else texts[middle:]


def _topics() -> list[str]:
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def _readmes() -> list[str]:
    """READMEs of the installed packages, by the names of the packages"""
    found = {one.name: one.metadata.json.get("description") for one in distributions()}
    return [
        str(text) for _, text in sorted(found.items()) if text and len(text) > _LONGEST // 2
    ]


def _licences() -> list[str]:
    """Licences of the installed packages, each text once"""
    found = set()
    for one in distributions():
        for path in one.files or []:
            if path.name.upper().startswith(("LICEN", "COPYING", "NOTICE")):
                file = Path(str(path.locate()))
                if file.is_file():
                    found.add(file.read_text(errors="ignore"))
    return sorted(found)


def _code() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [file.read_text(errors="ignore") for file in sorted(folder.glob("*.py"))]
