# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cat_modifier.integrations.transformers.saving import _atomic_folder, check_tensor_names

WRITE = """
import os, signal, sys
from pathlib import Path
from cat_modifier.checkpoint import saving
folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
steps = 0
original = saving._sync
def sync(path):  # killed at any of the points where something is on disk
    global steps
    original(path)
    steps += 1
    if steps == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
saving._sync = sync
with saving._atomic_folder(folder) as staging:
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "recipe.yaml"):
        (staging / name).write_text("new")
print(steps)
"""


def write(folder: Path, kill_at: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WRITE, str(folder), str(kill_at)],
        capture_output=True,
        text=True,
    )


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


OLD = {"config.json": "old", "model.safetensors": "old"}
NEW = dict.fromkeys(
    ["model-1.safetensors", "model-2.safetensors", "config.json", "recipe.yaml"], "new"
)


def test_a_killed_save_leaves_the_old_checkpoint_or_none_or_the_new_one(tmp_path):
    complete = write(tmp_path / "complete", 0)
    assert complete.returncode == 0, complete.stderr
    assert contents(tmp_path / "complete") == NEW
    steps = int(complete.stdout.split()[-1])
    assert steps > 5
    for kill_at in range(1, steps + 1, 2):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        for name, text in OLD.items():
            (folder / name).write_text(text)
        assert write(folder, kill_at).returncode == -signal.SIGKILL
        found = contents(folder)
        assert found in (OLD, NEW) or "config.json" not in found
    # and the next save cleans up
    assert write(folder, 0).returncode == 0
    assert contents(folder) == NEW
    assert not (folder / ".incomplete").exists()


def test_an_error_while_writing_leaves_the_old_checkpoint(tmp_path):
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OSError, match="disk is full"):
        with _atomic_folder(tmp_path) as staging:
            (staging / "config.json").write_text("new")
            raise OSError("disk is full")
    assert contents(tmp_path) == OLD
    assert not (tmp_path / ".incomplete").exists()


def test_a_new_folder_is_not_left_behind_with_half_a_checkpoint(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt):
        with _atomic_folder(folder) as staging:
            (staging / "model.safetensors").write_text("new")
            raise KeyboardInterrupt
    assert not folder.exists() or os.listdir(folder) == []


@pytest.mark.parametrize(
    "found, message",
    [
        ({}, "a.cat_input.weight is missing"),
        ({"a.cat_input.weight": (1, 2, 2)}, "a.cat_input.weight has shape"),
        (
            {"a.cat_input.weight": (2, 2, 2), "b.cat_input.weight": (2, 2, 2)},
            "b.cat_input",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(found, message):
    with pytest.raises(ValueError, match=message):
        check_tensor_names(found, {"a.cat_input.weight": (2, 2, 2)})
