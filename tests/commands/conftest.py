# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
from command_data import make_chat_model, write_chats

from cat_modifier.cli import main


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
