# SPDX-License-Identifier: Apache-2.0
"""What is known of the model behind a checkpoint: its id on the Hub, its licence."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

__all__ = ["BaseModel", "find_base_model"]

_CARD = "README.md"
_LARGEST = 1 << 20
"""Bytes of a card that are read"""
_SECONDS = 5
"""For which the Hub is asked, and a save waits"""

_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,99}")
_LICENSE_NAME = re.compile(r"[\w.+ -]{1,100}")
_LINK = re.compile(r"https?://[^\s<>\"'`|\\]{1,500}")
_FILE = re.compile(r"[\w.-]{1,100}")


@dataclass(frozen=True)
class BaseModel:
    """
    :param name: short name, for a heading
    :param id: id on the Hub; None if it is not known
    :param license: `license`, `license_name` and `license_link` of its card, those it has
    :param card: text of the card that this is from; empty if there is none
    :param problem: why its card could not be read; None if it was, or if it has none
    """

    name: str
    id: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    card: str = ""
    problem: str | None = None


def find_base_model(name_or_path: str, is_quantized: bool = False) -> BaseModel:
    """
    Find out what is known of a model, without waiting for a network that does not answer.

    :param name_or_path: id on the Hub, or folder, in the config of the model
    :param is_quantized: whether that is a checkpoint already, whose card names the original
    """
    folder = Path(name_or_path)
    is_folder = bool(name_or_path) and folder.is_dir()
    name = folder.resolve().name if is_folder else name_or_path.rpartition("/")[2]
    repo = _cached_id(folder.absolute()) if is_folder else _valid_id(name_or_path)
    try:
        card = (_read_file(folder / _CARD) if is_folder else _read_card(repo)).decode()
        data = RepoCard(card).data.to_dict() if card else {}
    except Exception as error:  # of files, YAML or the network: none is worth a checkpoint
        if is_quantized or isinstance(error, RepositoryNotFoundError):
            repo = None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return BaseModel(name, repo, problem=f"its {_CARD} cannot be read: {reason}")
    # a card's base model is another model, unless it is a quantized version of that
    if is_quantized or repo is None:
        is_named = data.get("base_model_relation") == "quantized"
        repo = _valid_id(data.get("base_model")) if is_named else None
        name = repo.rpartition("/")[2] if repo else name
    return BaseModel(name, repo, _license(data, repo), card)


def _valid_id(value: Any) -> str | None:
    """The id itself if it can be one of the Hub"""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return None
    return value


def _cached_id(folder: Path) -> str | None:
    """The id of a model in a folder of the Hub's cache"""
    found = [match for part in folder.parts if (match := _CACHED.fullmatch(part))]
    return _valid_id(f"{found[-1][1]}/{found[-1][2]}") if found else None


def _read_card(repo: str | None) -> bytes:
    """
    Read the card of a model from the cache or the Hub; empty if it has none.

    `hf_hub_download` repeats requests, for minutes if nobody answers
    """
    if repo is None:
        return b""
    cached = try_to_load_from_cache(repo, _CARD)
    if isinstance(cached, str):
        return _read_file(Path(cached))
    if cached is not None or constants.HF_HUB_OFFLINE:
        return b""
    end = time.monotonic() + _SECONDS
    url = hf_hub_url(repo, _CARD, endpoint=constants.ENDPOINT)
    options: Any = {"headers": build_hf_headers(), "timeout": _SECONDS}
    with get_session().stream("GET", url, **options) as response:
        try:
            hf_raise_for_status(response)
        except EntryNotFoundError:
            return b""
        content = b""
        for part in response.iter_bytes():
            content += part
            if len(content) > _LARGEST or time.monotonic() > end:
                raise ValueError("it is too long, or comes too slowly")
    return content


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(_LARGEST)


def _license(data: dict[str, Any], repo: str | None) -> dict[str, str]:
    """
    Take the licence of a card. What is no licence is left out.

    :param data: front matter, of anybody
    """
    found = {}
    for key, pattern in (("license", _LICENSE), ("license_name", _LICENSE_NAME)):
        if isinstance(data.get(key), str) and pattern.fullmatch(data[key]):
            found[key] = data[key]
    link = data.get("license_link")
    if isinstance(link, str) and _LINK.fullmatch(link):
        found["license_link"] = link
    elif isinstance(link, str) and _FILE.fullmatch(link) and repo is not None:
        # a file of the base model, which is not in this folder
        found["license_link"] = f"https://huggingface.co/{repo}/blob/main/{link}"
    return found
