# SPDX-License-Identifier: Apache-2.0
"""The plugin in a process of its own, as vLLM calls it"""

import subprocess
import sys
from importlib.metadata import version

from cat_modifier.version import __version__

REGISTER = """
import sys
from cat_modifier.integrations.vllm.plugin import METHOD_NAME, register
register()
register()
"""

BREAK = """
import vllm.distributed
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("gptq")  # imports all that vLLM itself needs
del vllm.distributed.get_pp_group
"""

CHECKPOINT = """
from vllm.model_executor.layers.quantization import get_quantization_config
method = get_quantization_config(METHOD_NAME).override_quantization_method
cat = {"transform_config": {"requires": "cat-modifier>=0.1.0"}}
"""


def run(program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_vllm_process_imports_neither_llm_compressor_nor_the_quantizers():
    check = """
loaded = [
    name
    for name in sys.modules
    if name.startswith(("llmcompressor", "cat_modifier.modifiers"))
    or name == "cat_modifier.integrations.transformers.quantizer"
]
assert not loaded, loaded
assert "cat_modifier.integrations.vllm.config" in sys.modules
"""
    result = run(REGISTER + check)
    assert result.returncode == 0, result.stderr


def test_a_moved_name_is_one_warning_and_other_models_serve():
    others = """
assert method({"quant_method": "compressed-tensors"}, None) is None
assert method({"quant_method": "gptq"}, None) is None
assert get_quantization_config("compressed-tensors")
"""
    result = run(BREAK + REGISTER + CHECKPOINT + others)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"cat-modifier {__version__} does not work") == 1
    assert f"does not work with vLLM {version('vllm').partition('+')[0]}" in result.stderr
    assert "get_pp_group" in result.stderr


def test_a_cat_checkpoint_is_then_refused_with_the_reason():
    claim = """
assert method(cat, None) == METHOD_NAME
assert method({"quant_method": "compressed-tensors"}, METHOD_NAME) == METHOD_NAME
get_quantization_config(METHOD_NAME).from_config(cat)
"""
    result = run(BREAK + REGISTER + CHECKPOINT + claim)
    assert result.returncode != 0
    assert "RuntimeError: cat-modifier" in result.stderr
    assert "get_pp_group" in result.stderr


def test_nothing_that_can_be_registered_is_a_warning():
    broken = "import sys; sys.modules['vllm.model_executor.layers.quantization'] = None\n"
    result = run(broken + REGISTER)
    assert result.returncode == 0, result.stderr
    assert "could not register" in result.stderr
