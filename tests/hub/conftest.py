# SPDX-License-Identifier: Apache-2.0
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve_hub
from huggingface_hub import constants

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden"

CARD = """---
license: apache-2.0
tags:
- cat-modifier
---

# A checkpoint
"""


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A server, which huggingface_hub in this process and in others asks"""
    environment = {
        "HF_HOME": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_of_alice",
    }
    with serve_hub() as server:
        for name, value in (environment | {"HF_ENDPOINT": server.url}).items():
            monkeypatch.setenv(name, value)
        # it reads these while it is imported
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        yield server


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """The golden checkpoint with a card"""
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint"))
    (folder / "README.md").write_text(CARD)
    return folder
