# SPDX-License-Identifier: Apache-2.0
"""The output folder: a report appears in it complete, or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["new_report"]

_LAST = "layers.json"
"""File that is moved last and names the others as `files`; with it the report is complete"""


@contextmanager
def new_report(folder: Path, overwrite: bool) -> Iterator[Path]:
    """
    Give a staging folder, and move its files to the output folder at the end of the context.

    After an error the output folder is as it was.

    :param folder: output folder; made if it does not exist
    :param overwrite: whether to replace an older report; other files are never touched
    :raises FileExistsError: if the folder holds a report or other files
    """
    _check(folder, overwrite)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=".unfinished-", dir=folder) as staging:
            yield Path(staging)
            _check(folder, overwrite)  # another analysis may have ended meanwhile
            last = folder / _LAST
            older = json.loads(last.read_text()).get("files", []) if last.exists() else []
            for name in [*older, _LAST]:
                (folder / Path(name).name).unlink(missing_ok=True)
            for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == _LAST):
                os.replace(path, folder / path.name)
    finally:
        if is_new:
            with suppress(OSError):  # it holds a report
                folder.rmdir()


def _check(folder: Path, overwrite: bool):
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose another --output")
    if overwrite or not folder.exists():
        return
    # an analysis that was killed leaves a hidden folder
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if names:
        found = "a finished report" if _LAST in names else "other files"
        raise FileExistsError(
            f"{folder} holds {found}: choose another --output, or replace a report and keep "
            "other files with --overwrite"
        )
