# SPDX-License-Identifier: Apache-2.0
"""
The wheel, installed into an environment of its own outside the clone: quantize with a
recipe of the package, and reload.

With CAT_TEST_EMPTY_ENVIRONMENT=1 the environment shares nothing with the one that runs the
tests, and holds what the wheel asks for.
"""

import os
import sys
from pathlib import Path

import pytest
from installing import PIP, ROOT, build_wheel, install_beside, run
from tiny_models import make_model

pytestmark = pytest.mark.slow

QUANTIZE = """
import sys
import cat_modifier
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

source, target = sys.argv[1:]
tokens = torch.randint(2, 128, (4, 48), generator=torch.Generator().manual_seed(0))
model = AutoModelForCausalLM.from_pretrained(source)
expected = model(tokens).logits
oneshot(
    model=model,
    recipe=cat_modifier.recipe("w4a4"),
    dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
    output_dir=target,
)
reloaded = AutoModelForCausalLM.from_pretrained(target)
error = (reloaded(tokens).logits - expected).norm() / expected.norm()
print(cat_modifier.__file__)
print(cat_modifier.recipe("w4a4"))
print(type(reloaded.hf_quantizer).__name__, error.item())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Folder of a virtual environment that holds the wheel"""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    if not os.environ.get("CAT_TEST_EMPTY_ENVIRONMENT"):
        return install_beside(sys.executable, wheel, folder / "venv").parents[1]
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    install = (*PIP, "--python", folder / "venv/bin/python", "install", "--quiet")
    run(*install, "torch==2.13.0", f"{wheel}[compress]", cwd=folder)
    return folder / "venv"


def test_a_recipe_of_the_wheel_quantizes(environment, tmp_path):
    make_model(tmp_path / "model")
    script = tmp_path / "quantize.py"
    script.write_text(QUANTIZE)
    *_, module, recipe, result = run(
        environment / "bin/python",
        script,
        tmp_path / "model",
        tmp_path / "quantized",
        cwd=tmp_path,
    )
    assert Path(module).is_relative_to(environment)
    assert Path(recipe).is_relative_to(environment)
    quantizer, error = result.split()
    assert quantizer == "CATHfQuantizer"
    assert float(error) < 0.7  # 4 bits of random weights; about 1.4 without transforms


def test_the_wheel_brings_the_command_and_the_plugin(environment, tmp_path):
    lines = run(environment / "bin/cat-modifier", "--help", cwd=tmp_path)
    assert any("analyze" in line for line in lines)
    code = (
        "from importlib.metadata import entry_points;"
        "print(*[e.value for e in entry_points(group='vllm.general_plugins')"
        " if e.name == 'cat_modifier'])"
    )
    lines = run(environment / "bin/python", "-c", code, cwd=tmp_path)
    assert lines == ["cat_modifier.integrations.vllm.plugin:register"]


def test_the_wheel_holds_all_that_is_no_module(environment):
    (package,) = environment.glob("lib/python*/site-packages/cat_modifier")
    for folder, target in (
        (ROOT / "cat_modifier", package),
        (ROOT / "recipes", package / "recipes"),
    ):
        expected = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        missing = {path for path in expected if not (target / path).exists()}
        assert {path for path in missing if "__pycache__" not in path.parts} == set()
