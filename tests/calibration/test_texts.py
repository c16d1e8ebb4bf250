# SPDX-License-Identifier: Apache-2.0
"""Texts that every Python installation has, and columns and splits of other datasets"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from cat_modifier.calibration.texts import (
    CALIBRATION_SPLITS,
    EMBEDDED,
    HELD_OUT_SPLITS,
    MIXED,
    load_texts,
    windows,
)


def test_the_halves_share_no_text():
    train, test = (load_texts(MIXED, split) for split in ("train", "test"))
    assert len(train) > 20 and len(test) > 20
    assert set(train).isdisjoint(test)


def test_kinds_alternate():
    topics = {text[:100] for text in load_texts(EMBEDDED, "train")}
    texts = load_texts(MIXED, "train")
    assert all(text[:100] in topics for text in texts[::4])
    assert sum(text[:100] in topics for text in texts) == len(texts) / 4
    assert max(map(len, texts)) <= 6000
    assert sum("import " in text for text in texts[3::4]) > len(texts) / 8


def chats(count: int) -> list[dict]:
    return [
        {"prompt": f"question {i}", "messages": [{"role": "user", "content": f"question {i}"}]}
        for i in range(count)
    ]


def write_rows(file: Path, rows: list[dict]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


class Tokenizer:
    """The part of a tokenizer that chats need"""

    chat_template = "a template"

    def apply_chat_template(self, chat, tokenize):
        return "".join(f"[{one['role']}] {one['content']}" for one in chat)


def test_chats_are_found_without_naming_their_column(tmp_path):
    pytest.importorskip("datasets")
    file = write_rows(tmp_path / "chats.jsonl", chats(3))
    found = load_texts(file, "train", None, Tokenizer())
    assert list(found) == [f"[user] question {i}" for i in range(3)] and len(found) == 3
    assert list(load_texts(file, "train", "prompt")) == [f"question {i}" for i in range(3)]


def test_a_column_of_text_is_preferred_to_chats(tmp_path):
    pytest.importorskip("datasets")
    rows = [one | {"text": "a text"} for one in chats(2)]
    file = write_rows(tmp_path / "both.jsonl", rows)
    assert load_texts(file, "train", None, Tokenizer()) == ["a text"] * 2


@pytest.mark.parametrize(
    "rows, column, message",
    [
        ([{"prompt": "a", "response": "b"}], None, r"\['prompt', 'response'\]: choose one"),
        ([{"prompt": "a", "response": "b"}], "text", r"no column 'text'"),
        (chats(1), None, "no chat template"),
        ([{"text": 1}], "text", "values of type int"),
    ],
)
def test_a_dataset_without_texts_lists_its_columns(tmp_path, rows, column, message):
    pytest.importorskip("datasets")
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_texts(file, "train", column)


def make_repository(folder: Path, *splits: str) -> str:
    """Make a folder as a dataset of the Hub is one"""
    folder.mkdir()
    files = [{"split": name, "path": f"{name}.jsonl"} for name in splits]
    configs = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(configs)}\n---\n")
    for name in splits:
        write_rows(folder / f"{name}.jsonl", [{"text": f"of {name}"}])
    return str(folder)


@pytest.mark.parametrize(
    "splits, calibration, held_out",
    [
        (("train", "test"), "train", "test"),
        (("test_sft", "train_sft", "train_gen"), "train_sft", "test_sft"),
        (("only",), "only", "only"),
    ],
)
def test_the_usual_split_is_taken(tmp_path, splits, calibration, held_out):
    pytest.importorskip("datasets")
    dataset = make_repository(tmp_path / "repository", *splits)
    assert load_texts(dataset, CALIBRATION_SPLITS) == [f"of {calibration}"]
    assert load_texts(dataset, HELD_OUT_SPLITS) == [f"of {held_out}"]
    assert load_texts(dataset, splits[-1]) == [f"of {splits[-1]}"]


def test_other_splits_are_listed(tmp_path):
    pytest.importorskip("datasets")
    dataset = make_repository(tmp_path / "repository", "chosen", "rejected")
    with pytest.raises(ValueError, match="has the splits chosen, rejected: choose one"):
        load_texts(dataset, CALIBRATION_SPLITS)
    with pytest.raises(ValueError, match="'no_such'.* cannot be read"):
        load_texts(dataset, "no_such")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", [[2, 3, 4, 5], [2, 3, 4, 5]]),
        ("<s> $A", [[0, 2, 3, 4], [0, 5, 2, 3]]),
        ("<s> $A </s>", [[0, 2, 3, 4], [0, 5, 2, 3]]),
        ("$A </s>", [[2, 3, 4, 5], [2, 3, 4, 5]]),
        ("$A <s>", [[2, 3, 4, 5], [2, 3, 4, 5]]),
        ("</s> <s> $A", [[1, 0, 2, 3], [1, 0, 4, 5]]),
    ],
)
def test_windows_begin_as_texts_do(template, expected):
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    backend = Tokenizers(WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    assert windows(["a b c d"] * 4, tokenizer, 4, 2).tolist() == expected
    if template == "</s> <s> $A":
        with pytest.raises(ValueError, match="2 tokens are too short"):
            windows(["a b c d"], tokenizer, 2, 1)
