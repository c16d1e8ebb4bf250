# SPDX-License-Identifier: Apache-2.0
"""No damaged checkpoint is silently wrong in vLLM, and errors name the part"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.mark.slow
def test_damage_is_named(tmp_path):
    file = tmp_path / "found.json"
    # a process of its own, in which vLLM starts a hundred times
    command = [
        sys.executable,
        str(TESTS / "mutations.py"),
        "vllm",
        "--few",
        "--json",
        str(file),
    ]
    process = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads(file.read_text())
    assert len(found) > 120
    assert not [one for one in found if one[1] in ("obscure", "wrong")]
    of_library = [name for name, outcome, _ in found if outcome == "library"]
    assert all("num_attention_heads" in name for name in of_library)
    unseen = {name for name, outcome, _ in found if outcome == "verify"}
    assert {name for name in unseen if not name.startswith("bit flipped")} <= {
        "field of the model changed: rms_norm_eps",
        "field of the model changed: rope_parameters.rope_theta",
    }
