# SPDX-License-Identifier: Apache-2.0
"""Models and data that a user names: files and folders, or ids on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = ["check_model", "public_name"]


def public_name(name: str) -> str:
    """
    Leave out the folders around a file or folder, which are nobody's business in a model card.

    :param name: path, or id on the Hub
    """
    return Path(name).resolve().name if Path(name).exists() else name


def check_model(model: str):
    """
    Refuse what can only be a folder and does not exist; the Hub would be asked for it.

    :param model: folder, or id on the Hub
    :raises FileNotFoundError: if the folder does not exist
    """
    if Path(model).is_dir():
        return
    try:
        validate_repo_id(model)
    except HFValidationError:
        raise FileNotFoundError(f"There is no folder {model}") from None
    owner, _, name = model.partition("/")
    if name and Path(owner).is_dir():
        raise FileNotFoundError(
            f"There is no folder {model}. If you mean a model of the Hub, work where there is "
            f"no folder {owner}"
        )
