# SPDX-License-Identifier: Apache-2.0
"""A report appears complete or not at all"""

import json
from pathlib import Path

import pandas as pd
import pytest

from cat_modifier.analysis import report
from cat_modifier.analysis.report import new_report


def write_report(folder: Path, overwrite: bool, *names: str):
    with new_report(folder, overwrite) as staging:
        for name in names:
            (staging / name).write_text(name)
        (staging / "layers.json").write_text(json.dumps({"files": names}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_report_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "new" / "report"
    with new_report(folder, False) as staging:
        (staging / "layers.json").write_text("{}")
        assert not (folder / "layers.json").exists()
    assert names(folder) == {"layers.json"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_folder_as_it_was(tmp_path, error):
    write_report(tmp_path / "old", False, "old.png")
    for folder in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(error), new_report(folder, True) as staging:
            (staging / "half.png").touch()
            raise error
    assert names(tmp_path) == {"old"}
    assert names(tmp_path / "old") == {"old.png", "layers.json"}


def test_an_older_report_is_replaced_if_asked_and_other_files_stay(tmp_path):
    write_report(tmp_path, False, "old.png", "both.png")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files.*--overwrite"):
        write_report(tmp_path, False, "new.png")
    assert names(tmp_path) == {"old.png", "both.png", "layers.json", "thesis.tex"}
    write_report(tmp_path, True, "both.png", "new.png")
    assert names(tmp_path) == {"both.png", "new.png", "layers.json", "thesis.tex"}
    assert json.loads((tmp_path / "layers.json").read_text())["files"] == [
        "both.png",
        "new.png",
    ]


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files"):
        write_report(tmp_path, False)
    with pytest.raises(NotADirectoryError):
        write_report(tmp_path / "thesis.tex", True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_names_are_no_formulas_in_a_spreadsheet(tmp_path):
    rows = pd.DataFrame({"layer": ["=1+1", "@a", "model.layers.0"], "sqnr": [-1.5, 2.0, 3.0]})
    report.without_formulas(rows).to_csv(tmp_path / "layers.csv", index=False)
    lines = (tmp_path / "layers.csv").read_text().splitlines()
    assert lines == ["layer,sqnr", "'=1+1,-1.5", "'@a,2.0", "model.layers.0,3.0"]
