# SPDX-License-Identifier: Apache-2.0
"""
Digests of the files of a checkpoint, in the format of the command ``sha256sum``.

Loading a checkpoint checks its config and its transforms. To check all weights takes as long
as to read them: that is for whoever doubts a copy.
"""

import hashlib
import json
import re
from pathlib import Path

from tqdm import tqdm

from cat_modifier.checkpoint.schema import read_quantization_config

__all__ = ["SUMS", "find_damage", "unknown_files", "write_sums"]

SUMS = "SHA256SUMS"
"""File with the digests"""

_NOT_LISTED = (SUMS, "README.md")
"""The model card is for users to edit"""


def write_sums(folder: Path):
    """Write the digests of the files in a folder that has just been written, except the card"""
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name not in _NOT_LISTED
    )
    (folder / SUMS).write_text("".join(f"{_digest(path)}  {path.name}\n" for path in files))


def unknown_files(folder: Path) -> list[str]:
    """List the files of weights in a folder that its digests, if it has any, do not know"""
    file = folder / SUMS
    if not file.is_file():
        return []
    known = set(re.findall(r"^\S+  (.*)$", file.read_text(), re.M))
    return [path.name for path in _files(folder) if path.name not in known]


def find_damage(folder: Path) -> list[str]:
    """
    Check all files of a CAT checkpoint.

    :param folder: folder of the checkpoint
    :return: a sentence for each file that is damaged
    :raises FileNotFoundError: if there is no file of digests
    :raises ValueError: if it is not a CAT checkpoint
    """
    if not (folder / SUMS).is_file():
        raise FileNotFoundError(
            f"{folder} has no {SUMS}, which every saved CAT checkpoint has: copy or download it"
        )
    damage = _config_damage(folder)
    for line in tqdm((folder / SUMS).read_text().splitlines(), desc="Reading"):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if match is None:
            damage.append(f"{SUMS} is damaged: {line!r} is no digest of a file")
            continue
        digest, name = match.groups()
        if not (folder / name).is_file():
            damage.append(f"{name} is missing")
        elif _digest(folder / name) != digest:
            damage.append(f"{name} is not the file that was saved, by its SHA-256")
    damage += [
        f"{name} is not of this checkpoint: {SUMS} does not list it"
        for name in unknown_files(folder)
    ]
    return damage


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("config.json"), *folder.glob("*.safetensors*")])


def _config_damage(folder: Path) -> list[str]:
    """
    Check the digests in the config, which say more than that of the file.

    :raises ValueError: if it is not a CAT checkpoint
    """
    if not (folder / "config.json").is_file():
        return []
    try:
        config = json.loads((folder / "config.json").read_text())
        read = read_quantization_config(config.get("quantization_config"))
    except ValueError as error:
        return [f"config.json: {error}"]
    if read is None:
        raise ValueError(f"{folder} holds no CAT checkpoint")
    return []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
