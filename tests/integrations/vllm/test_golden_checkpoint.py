# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of version 1 in the repository, served by vLLM"""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import serve

GOLDEN = Path(__file__).parents[2] / "checkpoint" / "golden"


@pytest.mark.slow
def test_it_computes_what_it_did():
    reference = json.loads((GOLDEN / "reference.json").read_text())
    result = serve(GOLDEN, reference["ids"], options={"dtype": "float32"})
    assert not result["error"], result["log"]
    assert result["quantization"] == "cat-modifier"
    found, expected = (torch.tensor(one["logprobs"]) for one in (result, reference))
    assert 10 * math.log10(expected.var() / (found - expected).var()) > 30
