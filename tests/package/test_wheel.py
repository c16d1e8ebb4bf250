# SPDX-License-Identifier: Apache-2.0
"""
The wheel, installed into an environment of its own outside the clone: quantize with a
recipe of the package, and reload.

The environment shares the libraries of the one that runs the tests, torch and llm-compressor
above all, because installing them takes minutes. It does not share cat-modifier: an
editable install works by a .pth file, and Python reads none in a folder that another
.pth file names. With CAT_TEST_EMPTY_ENVIRONMENT=1 it shares nothing, and holds what the
wheel asks for.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny_models import make_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

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


def run(*command, cwd: Path) -> list[str]:
    """Run a command that must succeed, without this process' paths; return its lines"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.splitlines()


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Folder of a virtual environment that holds the wheel"""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    install = [*pip, "--python", python, "install", "--quiet"]
    if os.environ.get("CAT_TEST_EMPTY_ENVIRONMENT"):
        run(*install, "torch==2.13.0", f"{wheel}[compress]", cwd=folder)
        return folder / "venv"
    run(*install, "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "venv/lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
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
