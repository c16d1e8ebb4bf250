# SPDX-License-Identifier: Apache-2.0
"""
The wheel, installed into environments of its own outside the clone.

An environment shares the libraries of another one, torch above all, because installing them
takes minutes. It does not share cat-modifier: an editable install works by a .pth file, and
Python reads none in a folder that another .pth file names.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def environment(**variables: str) -> dict[str, str]:
    """Variables of this process without its paths of Python, and others"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {"PYTHONNOUSERSITE": "1"} | variables


def run(*command, cwd: Path, **variables: str) -> list[str]:
    """Run a command that must succeed; return the lines of its output"""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.splitlines()


def build_wheel(folder: Path) -> Path:
    """Build the wheel into an empty folder"""
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_beside(python: str | Path, wheel: Path, folder: Path) -> Path:
    """
    Install the wheel into a new environment, beside the libraries of another one.

    :param python: interpreter of the other one
    :param folder: the new one
    :return: its interpreter
    """
    run(python, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    new = folder / "bin/python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(*PIP, "--python", new, *install, cwd=wheel.parent)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (shared,) = run(python, "-c", show, cwd=wheel.parent)
    (site,) = run(new, "-c", show, cwd=wheel.parent)
    (Path(site) / "shared.pth").write_text(shared)
    return new
