# SPDX-License-Identifier: Apache-2.0
"""
The output folder of an analysis, in which work that was interrupted is found again.

While an analysis runs, what it has computed is kept in ``.unfinished`` inside the folder:
its settings, the state of the calibration pass, and the finished rows. The files of the
report are written there too, and moved into place when all of them are complete.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from loguru import logger

__all__ = ["Workspace"]

_UNFINISHED = ".unfinished"
_SETTINGS = "settings.json"
_STATE = "calibration.pt"
_ROWS = "rows.jsonl"
_LAST = "layers.json"
"""The file which is moved into place last: with it the report is complete"""


class Workspace:
    """
    A context which owns the folder: a second process that enters it is refused.

    :param folder: is made if it does not exist
    :param settings: what the results depend on, for JSON
    :param overwrite: whether to replace an older report, or an unfinished one of other
        settings
    :param interval: least seconds between saves of the state of a pass; 0 to save each time

    :raises FileExistsError: if the folder holds other files, a finished report, or an
        unfinished one of other settings
    :raises BlockingIOError: if another process works in it
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        overwrite: bool = False,
        interval: float = 30.0,
    ):
        self.folder = Path(folder)
        # as it will be read back
        self.settings = json.loads(json.dumps(settings))
        self.overwrite = overwrite
        self._unfinished = self.folder / _UNFINISHED
        self._is_published = False
        self._saved = time.monotonic()
        self._interval = interval

    def __enter__(self) -> "Workspace":
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is a file: choose another --output")
        self._check_other_files()
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._unfinished / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                f"Another analysis is at work in {self.folder}: wait for it, or choose another "
                "--output"
            ) from error
        try:
            self._start_or_resume()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception):
        is_empty = not any((self._unfinished / name).exists() for name in (_STATE, _ROWS))
        # what is there after publishing is another process' work
        if is_empty and not self._is_published:
            # nothing to go on with: the next command may have any settings
            shutil.rmtree(self._unfinished, ignore_errors=True)
            with suppress(OSError):  # unless it holds a report
                self.folder.rmdir()
        self._lock.release()

    def _check_other_files(self):
        if self.overwrite or not self.folder.exists():
            return
        if (self.folder / _LAST).exists():
            raise FileExistsError(
                f"{self.folder} holds a finished report: choose another --output, or replace "
                "it with --overwrite"
            )
        if not self._unfinished.exists() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder} holds other files: choose another --output, or add to them "
                "with --overwrite"
            )

    def _start_or_resume(self):
        path = self._unfinished / _SETTINGS
        if path.exists():
            earlier = json.loads(path.read_text())
            if earlier == self.settings:
                logger.info(f"Resuming the analysis in {self.folder}")
                return
            if not self.overwrite:
                name = next(
                    key
                    for key in earlier.keys() | self.settings.keys()
                    if earlier.get(key) != self.settings.get(key)
                )
                raise FileExistsError(
                    f"{self.folder} holds an unfinished analysis with {name} "
                    f"{earlier.get(name)}, not {self.settings.get(name)}: repeat its command "
                    "to finish it, choose another --output, or replace it with --overwrite"
                )
            for name in (_STATE, _ROWS):
                (self._unfinished / name).unlink(missing_ok=True)
        _write(path, lambda part: part.write_text(json.dumps(self.settings, indent=2)))

    ## The state of a pass over the data ##

    def load_state(self) -> dict[str, Any] | None:
        """State that was saved last; None if none was"""
        path = self._unfinished / _STATE
        if not path.exists():
            return None
        # wherever it was: what goes on may run on other devices
        return torch.load(path, weights_only=True, map_location="cpu")

    def save_state(self, state: Callable[[], dict[str, Any]], now: bool = False):
        """
        Save the state of a pass, if it is time to: saving takes a twentieth of the time at
        most.

        :param state: gives it
        :param now: whether to save in any case
        """
        start = time.monotonic()
        if not now and start - self._saved < self._interval:
            return
        try:
            _write(self._unfinished / _STATE, lambda part: torch.save(state(), part))
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"The state of the analysis cannot be saved: {error}") from error
        self._saved = time.monotonic()
        if self._interval:
            self._interval = max(self._interval, 20 * (self._saved - start))

    ## Finished rows ##

    def load_rows(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by the key that they were added under"""
        path = self._unfinished / _ROWS
        if not path.exists():
            return {}
        # a process that was killed may have left half a line at the end
        complete, newline, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            _write(path, lambda part: part.write_bytes(complete + newline))
        entries = map(json.loads, complete.splitlines())
        return {entry["key"]: entry["rows"] for entry in entries}

    def add_rows(self, key: str, rows: list[dict[str, Any]]):
        with (self._unfinished / _ROWS).open("a") as file:
            file.write(json.dumps({"key": key, "rows": rows}) + "\n")

    ## The report ##

    def publish(self, write: Callable[[Path], None]):
        """
        Write the files of the report, move them into place, and forget the unfinished work.

        :param write: writes them to the folder that it is given; the last of them is
        `layers.json`, which names all others as `files`
        """
        staging = self._unfinished / "report"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write(staging)
        self._remove_older_report()
        for path in sorted(staging.iterdir(), key=lambda path: path.name == _LAST):
            os.replace(path, self.folder / path.name)
        shutil.rmtree(self._unfinished)
        self._is_published = True

    def _remove_older_report(self):
        last = self.folder / _LAST
        if last.exists():
            for name in json.loads(last.read_text()).get("files", []):
                (self.folder / Path(name).name).unlink(missing_ok=True)
            last.unlink()


def _write(path: Path, write: Callable[[Path], object]):
    """All of the file or nothing"""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
