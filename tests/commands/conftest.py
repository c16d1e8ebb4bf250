# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, make_model
from transformers import AutoTokenizer

from cat_modifier.cli import main

TEMPLATE = "{{ bos_token }}{% for one in messages %} {{ one.content }} <3>{% endfor %}"


def make_chat_model(folder: Path, family: str = "llama", **options):
    """Make a model of bfloat16, whose tokenizer has a chat template"""
    make_model(folder, family, dtype=torch.bfloat16, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def words(first: int, count: int) -> str:
    return " ".join(f"<{(first + i) * 7919 % VOCABULARY}>" for i in range(count))


def write_chats(file: Path):
    """Write a dataset of chats, as those for instruction tuning are"""
    rows = [
        {
            "prompt": words(i, 20),
            "messages": [
                {"role": "user", "content": words(i, 20)},
                {"role": "assistant", "content": words(i + 20, 40)},
            ],
        }
        for i in range(40)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, and a dataset of chats"""
    folder = tmp_path_factory.mktemp("commands")
    make_chat_model(folder / "model", tied=True)
    write_chats(folder / "chats.jsonl")
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run a command, and return its output. Raises SystemExit if it fails"""

    def run(*arguments) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["cat-modifier", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        if end.value.code:
            raise end.value
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def checkpoint(folder) -> Path:
    """The model, quantized by the command"""
    from cat_modifier.quantize.command import run

    run(
        model=str(folder / "model"),
        recipe="w4a4",
        output=folder / "checkpoint",
        dataset=str(folder / "chats.jsonl"),
        split=None,
        column=None,
        samples=8,
        length=64,
        overwrite=False,
        dry_run=False,
    )
    return folder / "checkpoint"
