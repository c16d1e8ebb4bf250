# SPDX-License-Identifier: Apache-2.0
"""The command line: help, defaults, interrupts"""

import inspect
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tiny_models import make_model

from cat_modifier import cli
from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.layers import DEFAULT_SCHEMES, DEFAULT_TRANSFORMS, analyze
from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE
from cat_modifier.calibration.texts import EMBEDDED
from cat_modifier.modifiers.cat.base import CATModifier
from cat_modifier.version import __version__

COMMANDS = ([], ["analyze"], ["quantize"], ["evaluate"], ["allocate"], ["verify"])


def defaults(function) -> dict:
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def show_help(*command: str) -> str:
    environment = os.environ | {"COLUMNS": "80"}
    arguments = [sys.executable, "-m", "cat_modifier.cli", *command, "--help"]
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_narrow_terminal_without_broken_words(command):
    text = show_help(*command)
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text.replace("NAME,...", "").replace("NAME=VALUE,...", "").replace(
        "[ARGS]...", ""
    )
    words = set(re.split(r"[\s,()]+", text))
    for name in command and defaults(getattr(cli, command[0])):
        option = "--" + name.replace("_", "-")
        assert option in words or name.upper() in text
    # a hyphen at the end of a line would be half a name
    assert not re.search(r"\w-$", text, re.MULTILINE)


def test_help_names_transforms_and_defaults():
    text = show_help("analyze")
    for name in TRANSFORMS:
        assert re.search(rf"^    {name} ", text, re.MULTILINE)
    for default in (",".join(DEFAULT_SCHEMES), *DEFAULT_IGNORE, EMBEDDED, "128", "all but"):
        assert default in text


def test_defaults_are_those_of_the_library():
    command, library = defaults(cli.analyze), defaults(analyze)
    assert tuple(command["schemes"].split(",")) == DEFAULT_SCHEMES
    assert tuple(command["transforms"].split(",")) == DEFAULT_TRANSFORMS
    assert tuple(command["ignore"]) == library["ignore"] == DEFAULT_IGNORE
    assert tuple(command["targets"]) == library["targets"]
    assert command["dataset"] == EMBEDDED
    size = CATModifier.model_fields["transform_block_size"].default
    assert command["transform_block_size"] == library["transform_block_size"] == size


def test_version():
    command = [sys.executable, "-m", "cat_modifier.cli", "--version"]
    assert subprocess.check_output(command, text=True) == f"{__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_library(command):
    code = f"""
import sys
from cat_modifier.cli import app
try:
    app([*{command!r}, "--help"])
finally:
    heavy = ("torch", "transformers", "pandas", "matplotlib", "cat_modifier.analysis")
    print("imported:", [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.slow
def test_an_interrupt_is_exit_code_130_without_a_traceback(tmp_path):
    make_model(tmp_path / "model")
    words = " ".join(f"<{i % 128}>" for i in range(400_000))
    (tmp_path / "text.txt").write_text(words)
    command = [sys.executable, "-m", "cat_modifier.cli", "analyze", "model"]
    command += ["--dataset", "text.txt", "--samples", "100000", "--length", "4"]

    def heed_interrupts():  # background jobs of a shell ignore interrupts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        for line in process.stderr:
            if "Calibrating" in line or (tmp_path / "report").exists():
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert not (tmp_path / "report").exists()
