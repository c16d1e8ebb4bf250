# SPDX-License-Identifier: Apache-2.0
"""NVFP4 and MXFP4 in real vLLM through its emulation, held against Transformers"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, exchange_a_block

EMULATED = {"llama-nvfp4": "NvFp4Kernel", "qwen3-mxfp4": "EmulationMxfp4LinearKernel"}


def run(served: Path, expected: Path, file: Path) -> tuple[dict, str]:
    """
    :param served: checkpoint to load in vLLM
    :param expected: checkpoint to load in Transformers
    :return: what run_emulated.py writes, and vLLM's log
    """
    script = str(Path(__file__).with_name("run_emulated.py"))
    process = subprocess.run(
        [sys.executable, script, str(served), str(expected), str(file)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    log = process.stdout + process.stderr
    assert process.returncode == 0, log
    return json.loads(file.read_text()), log


def largest_difference(result: dict) -> float:
    pairs = zip(result["logprobs"], result["expected"], strict=True)
    return max(abs(found - expected) for found, expected in pairs)


@pytest.mark.parametrize("name", EMULATED)
def test_linears_and_logprobs_are_those_in_transformers(checkpoints, tmp_path, name):
    folder = checkpoints / name
    result, log = run(folder, folder, tmp_path / "result.json")
    assert f"Using {EMULATED[name]} for " in log
    assert largest_difference(result) < 1e-4
    assert len(result["layers"]) == 2 * 4
    for layer, found in result["layers"].items():
        assert found["error"] < 1e-6, layer
        # the transform in front of o_proj is fused into v_proj
        is_transformed = not layer.endswith("o_proj")
        assert (found["method"] == "TransformLinearMethod") is is_transformed
        # no kernel may quantize an input that is yet to be transformed
        is_open = "nvfp4" in name and not is_transformed
        assert found["takes_quantized_input"] is is_open, layer


def test_one_exchanged_block_is_seen(checkpoints, tmp_path):
    folder = checkpoints / "llama-nvfp4"
    result, _ = run(exchange_a_block(folder, tmp_path), folder, tmp_path / "result.json")
    assert largest_difference(result) > 0.1
    errors = sorted(found["error"] for found in result["layers"].values())
    assert errors[-1] > 0.1 and errors[-2] < 1e-6
