# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def embedded_model(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, a real model"""
    sys.path.insert(0, str(ROOT / "examples"))
    from embedded_model import write_embedded_model

    folder = tmp_path_factory.mktemp("smollm2")
    write_embedded_model(folder)
    return folder


# first: options that select by mark run after it
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what analyzes the real model as slow"""
    for item in items:
        if "embedded_model" in item.fixturenames:
            item.add_marker("slow")
