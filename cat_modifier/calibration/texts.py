# SPDX-License-Identifier: Apache-2.0
"""Texts to calibrate and to evaluate on, as windows of tokens."""

import pydoc_data.topics
import random
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cat_modifier.calibration.columns import texts_of

__all__ = [
    "CALIBRATION_SPLITS",
    "EMBEDDED",
    "HELD_OUT_SPLITS",
    "MIXED",
    "hub_id",
    "load_texts",
    "windows",
]

EMBEDDED = "pydoc-topics"
"""English text of the Python installation: 150 kB, no download"""

MIXED = "python-mixed"
"""
Text of several kinds that every Python installation has: its documentation, the READMEs and
licences of the installed packages, and the code of the standard library. No download; which
READMEs and licences there are depends on the environment
"""

CALIBRATION_SPLITS = ("train", "train_sft")
"""Splits of a dataset to calibrate on, the first that exists"""

HELD_OUT_SPLITS = ("test", "test_sft", "validation")
"""Splits of a dataset to evaluate on, the first that exists"""

_LONGEST = 6000
"""Characters that are taken of one text, so that a window of tokens has few texts"""

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffixes to loaders of the datasets library"""


def load_texts(
    dataset: str,
    split: str | Sequence[str],
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Collection[str]:
    """
    Read texts to calibrate or evaluate on.

    :param dataset: ``pydoc-topics`` or ``python-mixed``; a text file (.txt, .md); a file with
        a column of texts or of chats (.json, .jsonl, .csv, .parquet); or a dataset of the
        Hugging Face Hub, ``id`` or ``id:configuration``
    :param split: split of a dataset of the Hub, see ``datasets.load_dataset``; or several, of
        which the first that exists is taken, or else the only one. The ``train`` split of
        pydoc-topics is one half of the topics, any other split the other half; so with each
        kind of python-mixed. Files have no splits
    :param column: column with the texts, or with chats: lists of ``{"role": ...,
        "content": ...}``. Default: the column ``text``, or else the first one of chats
    :param tokenizer: its chat template makes texts of chats
    :raises ValueError: if the dataset cannot be read, or has no such split or column
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
    if Path(dataset).suffix in (".txt", ".md"):
        try:
            return [Path(dataset).read_text()]
        except (OSError, ValueError) as error:
            raise ValueError(f"The dataset {dataset!r} cannot be read: {error}") from error
    return texts_of(_read_rows(dataset, split), dataset, column, tokenizer)


def hub_id(dataset: str) -> str | None:
    """
    :param dataset: name of texts, see :func:`load_texts`
    :return: id of a dataset on the Hub; None for other texts
    """
    path = Path(dataset)
    is_local = path.exists() or path.suffix in (".txt", ".md", *_READERS)
    if is_local or dataset in (EMBEDDED, MIXED):
        return None
    return dataset.partition(":")[0]


def windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> Tensor:
    """
    Cut texts into windows of tokens, without padding. Each begins with the tokens that the
    tokenizer puts before a text, if any: all others attend to them when a model is served.

    :param texts: texts, to be joined
    :param length: tokens per window
    :param count: upper bound of the number of windows
    :return: token ids, shape (windows, length), int64
    :raises ValueError: if the texts do not fill one window, or it is too short
    """
    start = _first_tokens(tokenizer)
    size = length - len(start)
    if size < 1:
        raise ValueError(
            f"Windows of {length} tokens are too short: the tokenizer puts {len(start)} before "
            "each text"
        )
    ids, end = [], size * count
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(ids) >= end:
            break
    found = min(len(ids) // size, count)
    if found == 0:
        raise ValueError(
            f"The texts have {len(ids)} tokens, too few for one window of {length}: use more "
            "text or shorter windows"
        )
    if found < count:
        logger.info(f"The texts fill {found} windows of {length} tokens, not {count}")
    return torch.tensor([start + ids[i * size : (i + 1) * size] for i in range(found)])


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the tokens that are put before every text, as one for its beginning"""
    ids = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    starts = range(len(ids) - len(plain) + 1)
    return ids[: next((i for i in starts if ids[i : i + len(plain)] == plain), 0)]


def _read_rows(dataset: str, split: str | Sequence[str]) -> Any:
    """
    Read a table of the datasets library.

    :raises ValueError: if it cannot be read, or has none of the splits
    """
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The dataset {dataset!r} needs the library datasets: pip install datasets"
        ) from error
    name, _, configuration = dataset.partition(":")
    try:
        if kind := _READERS.get(Path(dataset).suffix):
            return load_dataset(kind, data_files=dataset, split="train")
        if not isinstance(split, str):
            found = get_dataset_split_names(name, configuration or None)
            split = _choose_split(dataset, split, found)
        return load_dataset(name, configuration or None, split=split)
    except NoSplitError:
        raise
    except Exception as error:  # readers of all kinds, and the network
        which = f" (split {split!r})" if isinstance(split, str) else ""
        raise ValueError(f"The dataset {dataset!r}{which} cannot be read: {error}") from error


class NoSplitError(ValueError):
    """None of the splits that are wanted exists, and there are several others"""


def _choose_split(dataset: str, wanted: Sequence[str], found: Sequence[str]) -> str:
    chosen = next((name for name in wanted if name in found), None)
    if chosen is None and len(found) == 1:
        chosen = found[0]
    if chosen is None:
        raise NoSplitError(
            f"The dataset {dataset!r} has the splits {', '.join(found)}: choose one with "
            "--split"
        )
    logger.info(f"The dataset {dataset!r} is read from its split {chosen!r}")
    return chosen


def _half(texts: list[str], split: str | Sequence[str]) -> list[str]:
    middle = len(texts) // 2
    first = split if isinstance(split, str) else split[0]
    return texts[:middle] if first == "train" else texts[middle:]


def _topics() -> list[str]:
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def _readmes() -> list[str]:
    """READMEs of the installed packages, by the names of the packages"""
    # an interrupted installation leaves packages without a name
    found = {
        one.name: one.metadata.json.get("description") for one in distributions() if one.name
    }
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
