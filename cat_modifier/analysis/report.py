# SPDX-License-Identifier: Apache-2.0
"""
The files of a report: tables, figures, and a page that needs no network.

A report appears in its folder complete, or not at all.
"""

import base64
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import itables.options
import pandas as pd
import torch
from itables.javascript import generate_init_offline_itables_html
from jinja2 import Environment, PackageLoader

from cat_modifier.analysis import figures, summary
from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.comparison import Comparison
from cat_modifier.analysis.schemes import Scheme

__all__ = ["Report", "comparison_report", "layer_report", "new_report", "without_formulas"]

_LAST = "layers.json"
"""File that is moved last. It completes the report, and lists the other files as `files`"""

_WORST = 12  # Linears in the tables of the worst ones
_DIAGNOSIS_LABELS = ["Linear", "SQNR", "noise of", "limited by", "lost to concentration"]
_DIAGNOSIS_LABELS += ["lost to alignment", "gain by A8", "gain by W8", "gain by one block"]
_STARTS_OF_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
_COMPARISON_LABELS = ["Linear", "scheme", "weights", "activations", "both", "accumulated"]
_SHOWN_FIRST = ["layer", "transform", "scheme", "measured_db", "predicted_db"]
_ONLY_ON_PAGE = ["noise of", "lost to concentration", "lost to alignment"]
_NUMBERS = {"index": False, "float_format": "{:.2f}".format, "na_rep": "nan"}


@dataclass
class Report:
    """
    The content of a report.

    :param rows: all numbers, as a table
    :param settings: settings of the analysis, to be shown
    :param summary: sentences of the summary
    :param tables: tables by title
    :param figures: functions that draw a figure from the rows, by name
    :param record: further entries of `layers.json`
    """

    rows: pd.DataFrame
    settings: dict[str, Any]
    summary: list[str]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, figures.Draw]
    record: dict[str, Any] = field(default_factory=dict)

    def print(self):
        """Print the tables to a terminal, without the columns that are only on the page"""
        for title, table in self.tables.items():
            table = table.drop(columns=_ONLY_ON_PAGE, errors="ignore")
            if "Linear" in table:
                prefix = os.path.commonprefix(list(table["Linear"])).rpartition(".")[0]
                table["Linear"] = table["Linear"].str.removeprefix(f"{prefix}.")
            print(f"\n{title}\n\n{table.to_string(**_NUMBERS)}")

    def write(self, folder: Path):
        """Write `layers.csv`, `layers.json`, figures as PNG and SVG, and `report.html`"""
        missing = figures.write_figures(self.figures, self.rows, folder)
        versions = {name: version(name) for name in ("cat-modifier", "torch", "transformers")}
        versions["python"] = platform.python_version()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        page = Environment(loader=PackageLoader("cat_modifier.analysis", "."), autoescape=True)
        html = page.get_template("report.html.jinja").render(
            report=self,
            versions=versions | {"device": device},
            table_format=_NUMBERS | {"border": 0, "classes": "numbers"},
            figures=[
                (name, (draw.__doc__ or "").strip(), (folder / f"{name}.svg").read_bytes())
                for name, draw in self.figures.items()
                if name not in missing
            ],
            base64=base64.b64encode,
            missing=missing,
            scripts=generate_init_offline_itables_html(itables.options.dt_bundle),
            rows=itables.to_html_datatable(
                self.rows[sorted(self.rows, key=lambda name: name not in _SHOWN_FIRST)].round(
                    2
                ),
                connected=False,
                display_logo_when_loading=False,
                maxBytes=0,
                showIndex=False,
                lengthMenu=[25, 100, 1000],
                table_id="layers",
                classes="display compact nowrap",
                scrollX=True,
            ),
        )
        (folder / "report.html").write_text(html, encoding="utf-8")
        without_formulas(self.rows).to_csv(folder / "layers.csv", index=False)
        content = {"settings": self.settings, "versions": versions, **self.record}
        # nan and infinite values are null: JSON has neither
        content["layers"] = json.loads(self.rows.to_json(orient="records", double_precision=6))
        content["files"] = sorted(path.name for path in folder.iterdir())
        (folder / "layers.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def without_formulas(rows: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before texts that a spreadsheet would compute"""

    def escape(value: Any) -> Any:
        is_formula = isinstance(value, str) and value.startswith(_STARTS_OF_FORMULAS)
        return f"'{value}" if is_formula else value

    return rows.map(escape)


def layer_report(frame: pd.DataFrame, settings: dict[str, Any]) -> Report:
    """Make the report of an analysis. The summary covers the first scheme."""
    scheme = Scheme.parse(frame["scheme"].iloc[0])
    best = summary.best_transform(frame, scheme.name)
    means = summary.mean_table(frame).rename(index=lambda name: TRANSFORMS[name].label)
    worst = summary.diagnose(frame, scheme, best).head(_WORST)
    worst = worst.set_axis(_DIAGNOSIS_LABELS, axis="columns").dropna(axis="columns", how="all")
    title = f"Linears that lose most at {scheme.name} with {TRANSFORMS[best].label}, dB"
    means = means.rename_axis(columns=None).reset_index()
    tables = {"Mean measured SQNR, dB": means, title: worst}
    return Report(frame, settings, summary.sentences(frame, scheme), tables, figures.FIGURES)


def comparison_report(comparison: Comparison, settings: dict[str, Any]) -> Report:
    """Make the report of a comparison of a checkpoint with its original."""
    layers = comparison.layers
    sizes = ["in_features", "out_features"]
    worst = layers.nsmallest(_WORST, "measured_db").drop(columns=sizes)
    end_to_end = {
        "": ["original", "checkpoint"],
        "perplexity": comparison.perplexity.values(),
        "KL divergence, nats": [0.0, comparison.kl_divergence],
        "top-1 agreement, %": [100.0, 100 * comparison.top1_agreement],
    }
    title = "Linears that lose most: SQNR, dB, with what is quantized"
    tables = {
        f"End to end, {comparison.tokens} tokens": pd.DataFrame(end_to_end),
        title: worst.set_axis(_COMPARISON_LABELS, axis="columns"),
    }
    record = {key: value for key, value in vars(comparison).items() if key != "layers"}
    words = summary.comparison_sentences(comparison)
    return Report(layers, settings, words, tables, figures.COMPARISON_FIGURES, record)


@contextmanager
def new_report(folder: Path, overwrite: bool) -> Iterator[Path]:
    """
    Yield a staging folder. At the end of the context, move its files to the output folder.
    An error leaves the output folder unchanged.

    :param folder: output folder; created if it does not exist
    :param overwrite: whether to replace an older report. Other files stay
    :raises FileExistsError: if the folder holds files
    :raises NotADirectoryError: if it is a file
    """
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} holds files: choose another --output, or replace an older report and "
            "keep other files with --overwrite"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as staging:
        yield Path(staging)
        folder.mkdir(exist_ok=True)
        last = folder / _LAST
        older = json.loads(last.read_text()).get("files", []) if last.exists() else []
        for name in [*older, _LAST]:
            (folder / Path(name).name).unlink(missing_ok=True)
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == _LAST):
            os.replace(path, folder / path.name)
