# SPDX-License-Identifier: Apache-2.0
"""Imports of this package in a process of vLLM, and libraries missing there"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT

import cat_modifier

SERVE = """
import json, sys
from vllm import LLM

llm = LLM({model!r}, enforce_eager=True, max_model_len=64, dtype="float32")
llm.generate({{"prompt_token_ids": [5, 6, 7]}})
print(json.dumps(sorted(sys.modules)))
"""


def test_serving_imports_neither_llm_compressor_nor_the_quantizer(checkpoints):
    process = subprocess.run(
        [sys.executable, "-c", SERVE.format(model=str(checkpoints / "llama-w8a8"))],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    modules = json.loads(process.stdout.splitlines()[-1])
    assert "cat_modifier.integrations.vllm.config" in modules
    # vLLM imports Transformers' registry itself, but looks nothing up in it
    assert "cat_modifier.integrations.transformers.quantizer" not in modules
    assert "cat_modifier.modifiers.hook" not in modules
    assert "llmcompressor" not in modules


@pytest.mark.parametrize("name", sorted(cat_modifier.MODIFIERS))
def test_modifiers_name_the_extra_that_they_need(name):
    message = rf"{name} needs llm-compressor: pip install 'cat-modifier\[compress\]'"
    with pytest.raises(ImportError, match=message):
        getattr(cat_modifier, name)
