# SPDX-License-Identifier: Apache-2.0
"""Folders inside of a checkpoint's, which hold the files of a save until all are in place."""

from pathlib import Path

__all__ = ["FINISHED", "MOVING", "WRITING", "find_unfinished"]

WRITING = ".cat-save-writing"
FINISHED = ".cat-save-finished"
MOVING = ".cat-save-moving"


def find_unfinished(folder: Path) -> Path | None:
    """Find the folder with the files of a save that still runs, or was stopped"""
    states = [folder / name for name in (MOVING, FINISHED, WRITING)]
    return next((path for path in states if path.exists()), None)
