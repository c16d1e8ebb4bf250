# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier verify`"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from cat_modifier.checkpoint.digest import config_digests
from cat_modifier.checkpoint.schema import read_quantization_config
from cat_modifier.checkpoint.verify import SUMS
from cat_modifier.cli import main

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


def verify(folder: Path, monkeypatch) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["cat-modifier", "verify", str(folder)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_a_whole_checkpoint(folder, monkeypatch, capsys):
    assert not verify(folder, monkeypatch)
    assert "is the checkpoint that was saved" in capsys.readouterr().out


def test_one_bit_of_a_file(folder, monkeypatch):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "model.safetensors is not the file that was saved" in verify(folder, monkeypatch)


def test_all_that_is_damaged_is_named(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    error = verify(folder, monkeypatch)
    assert "config.json: `ignore` in the quantization_config" in error
    assert "model.safetensors is missing" in error


def test_a_config_that_somebody_vouches_for(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    config["quantization_config"]["transform_config"]["sha256"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert read_quantization_config(config["quantization_config"])
    assert "config.json is not the file that was saved" in verify(folder, monkeypatch)


def test_a_file_without_a_digest(folder, monkeypatch):
    (folder / SUMS).write_text("")
    assert "model.safetensors is not of this checkpoint" in verify(folder, monkeypatch)


def test_whole_numbers_have_one_digest(folder):
    text = (folder / "config.json").read_text()
    config = json.loads(text)["quantization_config"]
    group = next(iter(config["transform_config"]["config_groups"].values()))
    digests = []
    for ratio in (1, 1.0):
        group["clip_ratio"] = ratio
        digests.append(config_digests(config))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "file, content, message",
    [
        (SUMS, None, f"has no {SUMS}"),
        (SUMS, "0f0f model.safetensors\n", "is no digest of a file"),
        ("config.json", "{}", "holds no CAT checkpoint"),
    ],
)
def test_what_is_no_checkpoint(folder, monkeypatch, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    assert message in verify(folder, monkeypatch)
