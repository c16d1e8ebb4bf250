# SPDX-License-Identifier: Apache-2.0
"""Upload a checkpoint to the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from loguru import logger

from cat_modifier.checkpoint.unfinished import WRITING, find_unfinished
from cat_modifier.checkpoint.verify import find_damage
from cat_modifier.hub.card import CARD

__all__ = ["push"]

_HIDDEN = re.compile(r"\.(?!eval_results$).*|__pycache__")
"""Names of files and folders that are no part of a checkpoint"""
_WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Ends of names of files that a reader would take for parts of a checkpoint"""
_NETWORK_ERRORS: tuple[Any, ...] = HfHubHTTPError.__bases__
"""Errors of the HTTP library, which releases of huggingface_hub differ in, and of the system"""
_NOT_LOGGED_IN = "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN"


def push(folder: Path, repo: str, is_public: bool = False, revision: str | None = None) -> str:
    """
    Upload a checkpoint that is whole, in one commit: the repository holds the older one or
    this one. What had arrived when an upload was stopped is not sent again.

    :param folder: folder of the checkpoint
    :param repo: id of the repository, which is made if it does not exist
    :param is_public: whether all may read it; a public one is not written to without
    :param revision: branch, which is made if it does not exist. Default: main
    :return: address of the repository
    :raises ValueError: if the folder holds no whole checkpoint or no card that the Hub takes,
        or if the Hub refuses
    """
    _check(folder)
    api = HfApi()
    try:
        _check_card((folder / CARD).read_bytes().decode(), api)
        return _upload(folder, api, repo, is_public, revision)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no id of a repository: {_one_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(_NOT_LOGGED_IN) from error
    except HfHubHTTPError as error:
        raise ValueError(_explain(error, repo)) from error
    except (*_NETWORK_ERRORS, RuntimeError) as error:  # the latter about one file
        cause = error.__cause__ or error
        raise ValueError(
            f"The upload to {repo} stopped ({_one_line(cause)}): repeat the command. Files "
            "that arrived are not sent again"
        ) from error


def _check(folder: Path):
    """
    :raises ValueError: if a folder does not hold a whole checkpoint with a card
    """
    if (unfinished := find_unfinished(folder)) is not None:
        advice = (
            "remove that folder if you want the older checkpoint"
            if unfinished.name == WRITING
            else "finish it by finish_save of "
            "cat_modifier.integrations.transformers.atomic_folder"
        )
        raise ValueError(
            f"A save to {folder} was interrupted, or still runs: {unfinished} has its files. "
            f"Save again, or {advice}"
        )
    if damage := find_damage(folder):
        raise ValueError("; ".join(damage) + ". Nothing is uploaded: save it again")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json. Nothing is uploaded: save it again")
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}, the model card: save the model again")


def _check_card(text: str, api: HfApi):
    """
    Let the Hub check a card, before anything is made there.

    :raises ValueError: if it is not valid
    """
    try:
        RepoCard(text)
    except Exception as error:  # of YAML
        raise ValueError(
            f"The front matter of {CARD} cannot be read: {_one_line(error)}"
        ) from error
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"repoType": "model", "content": text},
        headers=build_hf_headers(),
    )
    if response.status_code == 400:
        try:
            errors = [str(one.get("message")) for one in response.json()["errors"]]
        except (ValueError, LookupError, TypeError, AttributeError):
            errors = [response.text]
        raise ValueError(
            f"The Hub refuses the front matter of {CARD}: {_short('; '.join(errors))}"
        )
    hf_raise_for_status(response)


def _upload(folder: Path, api: HfApi, repo: str, is_public: bool, revision: str | None) -> str:
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        # an id without a user is that of the user's own repository, which may exist
        repo = api.create_repo(repo, private=not is_public, exist_ok=True).repo_id
        info = api.model_info(repo)
    if not info.private and not is_public:
        raise ValueError(f"{repo} exists and is public: add --public to write to it")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = _files(folder)
    stale = [
        name
        for name in api.list_repo_files(repo, revision=revision)
        if name.endswith(_WEIGHTS) and name not in files
    ]
    # upload_folder and upload_large_folder make many commits, between which the repository
    # holds parts of two checkpoints
    api.create_commit(
        repo,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, path) for name, path in files.items()),
        ],
        commit_message="Upload a checkpoint by cat-modifier",
        revision=revision,
    )
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def _files(folder: Path) -> dict[str, Path]:
    """Find the files to upload, by their names in the repository; none that is hidden"""
    found, hidden = {}, set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file():
            continue
        if parts := list(filter(_HIDDEN.fullmatch, name.parts)):
            hidden.add(parts[0])
        else:
            found[name.as_posix()] = path
    if hidden:
        logger.info(f"Left out, because hidden: {', '.join(sorted(hidden))}")
    return found


def _explain(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    if status == 401:
        return _NOT_LOGGED_IN
    if status == 403:
        return (
            f"You have no right to write to {repo}: take a repository of your own, or a token "
            "with the right to write (`hf auth login`)"
        )
    if status < 500:
        return f"The Hub refuses the upload to {repo}: {_one_line(error)}"
    return (
        f"The Hub has a problem ({_one_line(error)}): repeat the command. Files that arrived "
        "are not sent again"
    )


def _one_line(error: BaseException) -> str:
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return _short(message)


def _short(text: str) -> str:
    return " ".join(text.split())[:500]
