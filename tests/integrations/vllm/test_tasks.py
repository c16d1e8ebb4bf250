# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier evaluate` with vLLM: a task of lm-eval, without a network"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from command_data import write_task
from conftest import ENVIRONMENT


def test_a_task_is_computed_by_vllm_with_4_bit_activations(checkpoints, tmp_path):
    write_task(tmp_path / "tasks")
    folder, file = tmp_path / "checkpoint", tmp_path / "results.json"
    shutil.copytree(checkpoints / "llama-w4a4-biases", folder)
    command = [sys.executable, "-m", "cat_modifier.cli", "evaluate", str(folder)]
    command += [
        "--base",
        str(checkpoints / "originals" / "llama-w4a4-biases"),
        "--samples",
        "0",
    ]
    command += ["--tasks", "words", "--include-path", str(tmp_path / "tasks")]
    command += ["--model", "vllm", "--model-args", "enforce_eager=True,max_model_len=64"]
    done = subprocess.run(
        [*command, "--output", str(file)],
        env=os.environ | ENVIRONMENT | {"HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-2000:]
    # the base first, whose Linears are not quantized
    assert log.count("W4A4 integers (activations: 4 bits, per token, asymmetric)") == 1

    written = json.loads(file.read_text())
    found = {one["name"]: one for one in written["measures"]}
    assert set(found) == {"words, acc", "words, acc_norm"}
    # of 12 questions
    assert all(
        one["value"] * 12 == pytest.approx(round(one["value"] * 12)) for one in found.values()
    )
    assert all(one["base"] is not None for one in found.values())
    assert "| words, acc " in done.stdout
    assert {"vllm", "lm-eval"} <= written["versions"].keys()
    assert "\\-\\-model vllm" in (folder / "README.md").read_text()
