# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/: misuse is one line, help is complete, the table is plain text"""

import json
import re
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import evaluate  # noqa: E402
import quantize  # noqa: E402


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script's `main` in an empty folder"""
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments: str):
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main()

    return run


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (quantize, ["./nope", "--recipe", "w4a4"], "There is no folder ./nope"),
        (quantize, ["nope", "--recipe", "my.yaml"], "There is no file my.yaml"),
        (quantize, ["nope", "--recipe", "w3a3"], "no recipe 'w3a3': choose one of mxfp4, "),
        (evaluate, ["bf16=./nope"], "There is no folder ./nope"),
        (evaluate, ["./nope"], "There is no folder ./nope"),
    ],
)
def test_misuse_is_one_line(run, capsys, script, arguments, message):
    output = ["--output", "new"] if script is quantize else []
    with pytest.raises(SystemExit) as end:
        run(script, *arguments, *output)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("script, split", [(quantize, "train"), (evaluate, "test")])
def test_help_says_what_datasets_can_be_and_the_defaults(run, capsys, script, split):
    with pytest.raises(SystemExit):
        run(script, "--help")
    text = " ".join(capsys.readouterr().out.split())
    parts = (".txt", ".parquet", "pydoc-topics", "python-mixed")
    for part in (*parts, f"(default: {split})", "(default: 512)"):
        assert part in text


def test_a_table_has_a_row_for_each_model_named_or_not(run, capsys, tmp_path):
    make_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(f"<{i % 128}>" for i in range(2000)))
    data = ["--dataset", "text.txt", "--length", "64", "--samples", "30"]
    run(evaluate, "tiny", "a name=tiny", *data, "--json", "table.json")
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("| 1,920 held-out tokens | perplexity |")
    assert [re.split(r" *\| *", row)[1] for row in rows] == ["tiny", "a name"]
    written = json.loads((tmp_path / "table.json").read_text())["models"]
    assert rows[0].split("|")[2].strip() == f"{written['tiny']['perplexity']:.2f}"
    assert written["tiny"] == written["a name"]
