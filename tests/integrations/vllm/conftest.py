# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import replace_tensors

CHECKPOINTS = Path(os.environ.get("CAT_TEST_CHECKPOINTS", ""))

# one process, which starts in seconds
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def serve(model: Path, ids: list, environment: dict | None = None, **job) -> dict:
    """
    :param job: see run_vllm.py
    :return: what it writes, with its log under "log"; "error" if it failed
    """
    job = {"model": str(model), "ids": ids, "options": {}} | job
    script = str(Path(__file__).parent / "run_vllm.py")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        process = subprocess.run(
            [sys.executable, script, json.dumps(job), str(file)],
            env=os.environ | ENVIRONMENT | (environment or {}),
            capture_output=True,
            text=True,
            timeout=900,
        )
        result = json.loads(file.read_text()) if process.returncode == 0 else {}
    return result | {"log": process.stdout + process.stderr, "error": not result}


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    return 10 * math.log10(expected.var() / (found - expected).var())


def exchange_a_block(checkpoint: Path, tmp_path: Path) -> Path:
    """Copy a checkpoint, with one block of a transform damaged"""
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    transform = next(one for key, one in tensors.items() if key.endswith("cat_input.weight"))
    transform[0] = transform[0].flip(0)
    replace_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    if not (CHECKPOINTS / "smollm2-w4a4" / "config.json").exists():
        pytest.fail(
            "set CAT_TEST_CHECKPOINTS to a folder made by make_checkpoints.py, which is beside "
            "this file, or run all tests with tests/run.sh"
        )
    return CHECKPOINTS
