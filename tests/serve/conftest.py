# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    :return: what it prints, with its log under "log"; "error" if it failed
    """
    job = {"model": str(model), "ids": ids, "options": {}} | job
    command = [
        sys.executable,
        str(Path(__file__).parent / "run_vllm.py"),
        json.dumps(job),
    ]
    result = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    log = result.stdout + result.stderr
    if result.returncode != 0:
        return {"error": True, "log": log}
    return json.loads(result.stdout.strip().splitlines()[-1]) | {
        "log": log,
        "error": False,
    }


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    if not (CHECKPOINTS / "smollm2-w4a4" / "config.json").exists():
        pytest.fail(
            "set CAT_TEST_CHECKPOINTS to a folder made by tests/serve/make_checkpoints.py, or "
            "run all tests with tests/run.sh"
        )
    return CHECKPOINTS
