# SPDX-License-Identifier: Apache-2.0
"""
Replace the checkpoint in a folder by a new one, all of it or nothing.

A save goes through folders inside the target, whose names are its state:

1. ``.cat-save-writing``: files are being written. The older checkpoint is untouched, and an
   error or a kill leaves it so. :class:`UnfinishedSaveError` keeps the files that are
   written until the next save.
2. ``.cat-save-finished``: all files are written. Once they are on disk, files of the older
   checkpoint are removed, ``config.json`` first: without it no reader loads the folder.
3. ``.cat-save-moving``: files are being moved into the target, ``config.json`` last.

An error or a kill in 2 or 3 loses nothing: :func:`finish_save`, or the next save to the same
folder, continues there.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from loguru import logger
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cat_modifier.checkpoint.unfinished import FINISHED, MOVING, WRITING, find_unfinished

__all__ = ["UnfinishedSaveError", "atomic_folder", "finish_save", "holds_weights"]

_LOCK = ".cat-save.lock"

_WEIGHTS = re.compile(
    "|".join(
        (
            re.escape(SAFE_WEIGHTS_NAME),
            re.escape(SAFE_WEIGHTS_INDEX_NAME),
            r"model-\d{5}-of-\d{5}\.safetensors",
        )
    )
)
"""Names of the weights of a checkpoint, as Transformers writes them"""


class UnfinishedSaveError(OSError):
    """A checkpoint is written, but not moved to where it should be."""


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Context that yields a staging folder, and moves what is written there into ``folder``.

    Two saves to one folder wait for each other.

    :param folder: target; may exist, and hold an older checkpoint and other files
    :raises UnfinishedSaveError: if all is written, but cannot be moved. The error says where
        the files are
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / WRITING
    with _lock(folder):
        with _kept_files(folder):
            _finish(folder)
        shutil.rmtree(writing, ignore_errors=True)  # of a save that was killed
        writing.mkdir()
        try:
            yield writing
        except UnfinishedSaveError:
            raise  # the files are worth keeping
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        with _kept_files(folder):
            writing.rename(folder / FINISHED)
            _finish(folder)


def finish_save(folder: str | os.PathLike):
    """
    Finish a save that wrote all files, but was stopped before it had moved them.

    :param folder: target of the save
    :raises FileNotFoundError: if the folder holds no such save
    :raises UnfinishedSaveError: if the files cannot be moved
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}")
    with _lock(folder):
        if not ((folder / FINISHED).exists() or (folder / MOVING).exists()):
            raise FileNotFoundError(f"{folder} holds no save that could be finished")
        with _kept_files(folder):
            _finish(folder)


def _finish(folder: Path):
    finished, moving = folder / FINISHED, folder / MOVING
    if finished.exists():
        files = [path.relative_to(finished) for path in _files(finished)]
        _check_targets(folder, files)
        _make_readable(finished)
        # also when a save is continued: an error may have left files in memory alone
        _sync_all(finished)
        _sync(folder)
        if (finished / CONFIG_NAME).exists():
            _remove_checkpoint(folder)
        finished.rename(moving)
        _sync(folder)
    if moving.exists():
        # a config that is in place promises that all else is
        files = sorted(_files(moving), key=lambda path: path == moving / CONFIG_NAME)
        for path in files:
            target = folder / path.relative_to(moving)
            if path == moving / CONFIG_NAME:
                _sync(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        _sync(folder)
        shutil.rmtree(moving, ignore_errors=True)


def _check_targets(folder: Path, files: list[Path]):
    """
    Check that files can be moved into a folder, before anything is removed there.

    :param files: relative paths
    :raises OSError: if the place of a file is taken by a folder, or the reverse
    """
    for path in files:
        target = folder / path
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder: rename it")
        for parent in path.parents:
            if (folder / parent).exists() and not (folder / parent).is_dir():
                raise NotADirectoryError(f"{folder / parent} is a file: rename it")


def _remove_checkpoint(folder: Path):
    """Remove the config and the weights of an older checkpoint, and no other file"""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    _sync(folder)
    for path in list(folder.iterdir()):
        if _WEIGHTS.fullmatch(path.name) and not path.is_dir():
            path.unlink()


@contextmanager
def _kept_files(folder: Path) -> Iterator[None]:
    """Say where the files of a finished save are, on any error"""
    try:
        yield
    except BaseException as error:
        place = find_unfinished(folder)
        if place is None:
            raise
        first = f"rename {place} to {FINISHED}, then " if place.name == WRITING else ""
        message = (
            f"A checkpoint is written, but could not be moved into {folder}. "
            f"{type(error).__name__}: {error}. "
            f"Nothing is lost: its files are in {place}, apart from those that are in "
            f"{folder} already. Remove the cause; {first}call "
            f"{finish_save.__module__}.{finish_save.__name__}({str(folder)!r})"
        )
        if isinstance(error, Exception):
            raise UnfinishedSaveError(message) from error
        logger.error(message)
        raise


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which a kill releases"""
    path = folder / _LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"Waiting for another save to {folder}")
        lock.acquire()
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): do not save to it twice at once")
    try:
        yield
    finally:
        try:
            # while it is locked: filelock does not take a file without a name for the lock
            with suppress(OSError):
                path.unlink()
        finally:
            lock.release()


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a config, and all weights of a checkpoint, whole"""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    try:
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
        for name in names:
            with safe_open(folder / name, "pt"):  # an error if the file is cut off
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return (folder / CONFIG_NAME).exists()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _make_readable(folder: Path):
    """Give the weights the mode of the config; safetensors lets their owner alone read them"""
    mode = next((path.stat().st_mode for path in folder.glob("*.json")), None)
    if mode is not None:
        for path in folder.glob("*.safetensors"):
            path.chmod(mode)


def _sync_all(folder: Path):
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path):
    """Write a file, or the names in a folder, to disk"""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some mounts have no such call for folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
