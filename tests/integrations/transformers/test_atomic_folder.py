# SPDX-License-Identifier: Apache-2.0
import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cat_modifier.integrations.transformers.atomic_folder import (
    UnfinishedSaveError,
    atomic_folder,
    finish_save,
)

SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
# a checkpoint in shards, one in a single file, and one in shards again
OLD = dict.fromkeys(["config.json", "model.safetensors.index.json", *SHARDS], "old")
NEW = dict.fromkeys(["config.json", "model.safetensors", "recipe.yaml", "code/a.py"], "new")
NEWER = dict.fromkeys(OLD, "newer")
# files of the user, whose names come close
OTHERS = dict.fromkeys(
    ["model_backup.safetensors", "model-00001-of-2.safetensors", "README.md", "code/b.py"],
    "other",
)

STEPS = ("replace", "rename", "unlink", "fsync", "chmod", "mkdir")
"""Functions of `os` that a save goes through"""


def write(folder: Path, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".cat-save")
    }


def save(folder: Path, files: dict[str, str]):
    with atomic_folder(folder) as staging:
        write(staging, files)


def target(tmp_path: Path, name: str = "target") -> Path:
    write(tmp_path / name, OLD | OTHERS)
    return tmp_path / name


def assert_holds(folder: Path, checkpoint: dict[str, str]):
    """Check that the folder holds this checkpoint only, and the files of the user"""
    found = contents(folder)
    others = found.items() - checkpoint.items() - OTHERS.items()
    assert found == found | checkpoint | OTHERS
    assert {name for name, _ in others} <= {"recipe.yaml", "code/a.py"}
    assert not list(folder.glob(".cat-save*"))


def assert_recovers(folder: Path, message: str | None):
    """Check that the older or the new checkpoint is there, or that the save can be finished"""
    found = contents(folder)
    unfinished = [path.name for path in folder.glob(".cat-save-[wfm]*")]
    is_old = found == OLD | OTHERS
    if found == NEW | OTHERS and not unfinished:
        return
    assert is_old or "config.json" not in found or unfinished == [".cat-save-moving"]
    if unfinished == [".cat-save-writing"]:
        assert is_old
        if message is None:  # killed while writing
            return
        assert str(folder / ".cat-save-writing") in message
        assert "rename" in message
        (folder / ".cat-save-writing").rename(folder / ".cat-save-finished")
    elif not unfinished:  # failed before all was written
        assert is_old
        return
    elif message is not None:
        assert str(folder / unfinished[0]) in message
        assert "finish_save" in message
    finish_save(folder)
    assert contents(folder) == NEW | OTHERS
    assert not list(folder.glob(".cat-save*"))


class Fault:
    """Calls a function instead of the n-th step of a save"""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, number: int, strike: Callable[[], None]
    ):
        self.count = 0
        for name in STEPS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        self.number, self.strike = number, strike

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.count += 1
            if self.count == self.number:
                self.strike()
            return function(*args, **kwargs)

        return wrapped


def count_steps(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        fault = Fault(monkeypatch, 0, lambda: None)
        save(folder, NEW)
    assert contents(folder) == NEW | OTHERS
    return fault.count


def in_child(function: Callable[[], None]) -> int:
    """Run a function in a child process; return its status, see `os.waitpid`"""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        function()
        os._exit(0)
    finally:
        os._exit(1)


def fail():
    raise OSError(errno.EIO, "Input/output error")


def interrupt():
    raise KeyboardInterrupt


def test_a_save_replaces_the_checkpoint_and_no_other_file(tmp_path):
    folder = target(tmp_path)
    save(folder, NEW)
    assert contents(folder) == NEW | OTHERS
    assert not list(folder.glob(".cat-save*"))
    # files that are not a checkpoint, such as an adapter, do not replace a checkpoint
    save(folder, {"adapter_model.safetensors": "adapter"})
    assert contents(folder) == NEW | OTHERS | {"adapter_model.safetensors": "adapter"}


@pytest.mark.slow
@pytest.mark.parametrize("strike", [fail, interrupt])
def test_a_fault_at_any_step_loses_nothing(tmp_path, strike):
    steps = count_steps(target(tmp_path))
    assert steps > 20
    raised = 0
    for number in range(1, steps + 1):
        folder = target(tmp_path, str(number))
        messages = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            from cat_modifier.integrations.transformers import atomic_folder as module

            monkeypatch.setattr(module.logger, "error", messages.append)
            Fault(monkeypatch, number, strike)
            try:
                save(folder, NEW)
            except (OSError, KeyboardInterrupt) as error:
                raised += 1
                if isinstance(error, UnfinishedSaveError):
                    messages.append(str(error))
        assert_recovers(folder, messages[0] if messages else None)
        save(folder, NEWER)
        assert_holds(folder, NEWER)
    # a fault while the lock or an empty folder is removed has no effect
    assert raised > 20


@pytest.mark.slow
def test_a_kill_at_any_step_loses_nothing(tmp_path):
    steps = count_steps(target(tmp_path))
    for number in range(1, steps + 1):
        folder = target(tmp_path, str(number))

        def killed(number=number, folder=folder):
            with pytest.MonkeyPatch.context() as monkeypatch:
                Fault(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save(folder, NEW)

        assert in_child(killed) == signal.SIGKILL
        assert_recovers(folder, None)

        # the next save finishes it, and then replaces it
        folder = target(tmp_path, f"{number} again")
        assert in_child(lambda: killed(folder=folder)) == signal.SIGKILL  # noqa: B023
        save(folder, NEWER)
        assert_holds(folder, NEWER)


@pytest.mark.parametrize("taken", ["config.json", "model.safetensors", "code"])
def test_a_place_that_is_taken_is_an_error_before_anything_is_removed(tmp_path, taken):
    write(tmp_path, OLD)
    if taken == "code":
        (tmp_path / taken).write_text("a file")
    else:
        (tmp_path / taken).unlink(missing_ok=True)
        (tmp_path / taken).mkdir()
    before = contents(tmp_path)
    with pytest.raises(UnfinishedSaveError, match=f"{taken}.*rename it|rename it.*{taken}"):
        save(tmp_path, NEW)
    assert contents(tmp_path) == before
    # the same for the next save, as long as the place is taken
    with pytest.raises(UnfinishedSaveError, match="rename it"):
        save(tmp_path, NEWER)
    (tmp_path / taken).rename(tmp_path / "moved")
    finish_save(tmp_path)
    assert (contents(tmp_path) | NEW) == contents(tmp_path)


@pytest.mark.parametrize("number, is_error", [(errno.EINVAL, False), (errno.EIO, True)])
def test_mounts_that_cannot_sync_a_folder(tmp_path, monkeypatch, number, is_error):
    fsync = os.fsync

    def fsync_of_files(descriptor: int):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, "no sync of folders")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    if is_error:
        with pytest.raises(UnfinishedSaveError, match=r"\.cat-save-finished"):
            save(tmp_path, NEW)
    else:
        save(tmp_path, NEW)
        assert contents(tmp_path) == NEW


@pytest.mark.parametrize("error", [OSError("disk is full"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_checkpoint(tmp_path, error):
    folder = target(tmp_path)
    with pytest.raises(type(error)) as raised:
        with atomic_folder(folder) as staging:
            (staging / "config.json").write_text("new")
            raise error
    assert raised.value is error
    assert contents(folder) == OLD | OTHERS
    assert not list(folder.glob(".cat-save*"))
    with pytest.raises(FileNotFoundError, match="no save that could be finished"):
        finish_save(folder)


def test_a_target_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError):
        save(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.slow
def test_saves_at_once_do_not_mix(tmp_path):
    kinds = [OLD, NEW, NEWER]
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        children = []
        for files in kinds:
            if not (child := os.fork()):
                try:
                    save(folder, files)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        found = contents(folder)
        weights = {name: text for name, text in found.items() if name.startswith("model")}
        assert any(
            weights == {name: text for name, text in files.items() if name.startswith("model")}
            and found["config.json"] == files["config.json"]
            for files in kinds
        )
        assert not list(folder.glob(".cat-save*"))


def test_a_save_waits_for_another(tmp_path):
    order = []
    with atomic_folder(tmp_path) as staging:
        other = threading.Thread(target=lambda: (save(tmp_path, NEWER), order.append("second")))
        other.start()
        other.join(0.5)
        assert other.is_alive()
        write(staging, NEW)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert contents(tmp_path)["config.json"] == "newer"


def test_a_folder_that_cannot_be_locked_is_warned_of(tmp_path, monkeypatch):
    from cat_modifier.integrations.transformers import atomic_folder as module

    def acquire(self, timeout=None):
        raise OSError(errno.ENOLCK, "No locks available")

    warnings = []
    monkeypatch.setattr(module.FileLock, "acquire", acquire)
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    save(tmp_path, NEW)
    assert "No locks available" in warnings[0]
    assert contents(tmp_path) == NEW
