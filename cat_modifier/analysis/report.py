# SPDX-License-Identifier: Apache-2.0
"""The files of a report: tables, figures, and a page that needs no network."""

import base64
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import itables.options
import pandas as pd
import torch
from itables.javascript import generate_init_offline_itables_html
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from cat_modifier.analysis.comparison import Comparison
from cat_modifier.analysis.figures import COMPARISON_FIGURES, FIGURES, caption, write_figures
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.summary import (
    best_transform,
    comparison_sentences,
    diagnose,
    mean_table,
    sentences,
)
from cat_modifier.analysis.transforms import TRANSFORMS

__all__ = ["Report", "comparison_report", "layer_report"]

_WORST = 12
"""Linears in the tables of the worst ones"""

_LABELS = {
    "layer": "Linear",
    "sqnr": "SQNR",
    "noise": "noise of",
    "limit": "limited by",
    "concentration_loss": "lost to concentration",
    "alignment_loss": "lost to alignment",
    "gain_activations": "gain by A8",
    "gain_weights": "gain by W8",
    "gain_full": "gain by one block",
    "measured_weights_db": "weights",
    "measured_activations_db": "activations",
    "measured_db": "both",
    "accumulated_db": "accumulated",
}
_ONLY_ON_PAGE = ["noise of", "lost to concentration", "lost to alignment"]
"""Columns for which a terminal has no room"""

_NUMBERS = {"index": False, "float_format": "{:.2f}".format, "na_rep": "nan"}

_TERMS = (
    "SQNR is the energy of a Linear's output over the energy of its error: one more bit is "
    "6 dB. "
)
_LAYER_TERMS = _TERMS + (
    "It is the sum, in dB, of bits, concentration (how well values fill their range) and "
    "alignment (how well the weight meets the directions in which inputs are large). Measured "
    "on a sample of 128 tokens of each input, which stands for all."
)
_COMPARISON_TERMS = _TERMS + (
    "Accumulated: within the quantized model, after the errors of all Linears before it; all "
    "other columns: with the input of the original."
)
_DIAGNOSIS_NOTE = (
    "Lost to concentration: against normal data. Lost to alignment: against what blocks of "
    "this size can achieve. Limited by: the larger loss, or bits if there is none above 1 dB. "
    "Gains: by 8-bit activations (A8), 8-bit weights (W8), one block over the whole input."
)


@dataclass
class Report:
    """
    :param rows: all numbers
    :param settings: settings of the analysis, for the record
    :param summary: sentences
    :param tables: tables by title
    :param figures: functions that draw from the rows, by name
    :param terms: explanation of the terms
    :param note: explanation of the tables
    :param record: further entries of `layers.json`
    """

    rows: pd.DataFrame
    settings: dict[str, Any]
    summary: list[str]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, Callable[[pd.DataFrame], Figure]]
    terms: str
    note: str = ""
    record: dict[str, Any] = field(default_factory=dict)

    def print(self):
        """Print the tables to a terminal, as far as there is room"""
        for title, table in self.tables.items():
            table = table.drop(columns=_ONLY_ON_PAGE, errors="ignore")
            if "Linear" in table:
                prefix = os.path.commonprefix(list(table["Linear"])).rpartition(".")[0]
                table["Linear"] = table["Linear"].str.removeprefix(f"{prefix}.")
            print(f"\n{title}\n\n{table.to_string(**_NUMBERS)}")

    def write(self, folder: Path):
        """
        Write `layers.csv`, `layers.json`, the figures as PNG and SVG, and `report.html`.

        :param folder: an empty folder
        """
        missing = write_figures(self.figures, self.rows, folder)
        versions = {name: version(name) for name in ("cat-modifier", "torch", "transformers")}
        versions["python"] = platform.python_version()
        has_gpu = torch.cuda.is_available()
        page = Environment(loader=PackageLoader("cat_modifier.analysis", "."), autoescape=True)
        html = page.get_template("report.html.jinja").render(
            report=self,
            versions=versions | {"device": torch.cuda.get_device_name() if has_gpu else "CPU"},
            tables={
                title: table.to_html(border=0, classes="numbers", **_NUMBERS)
                for title, table in self.tables.items()
            },
            figures=[
                (name, caption(draw), base64.b64encode((folder / f"{name}.svg").read_bytes()))
                for name, draw in self.figures.items()
                if name not in missing
            ],
            missing=missing,
            scripts=generate_init_offline_itables_html(itables.options.dt_bundle),
            rows=itables.to_html_datatable(
                _shown_first(self.rows),
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
        self.rows.to_csv(folder / "layers.csv", index=False)
        content = {"settings": self.settings, "versions": versions, **self.record}
        # nan and infinite values are null: JSON has neither
        content["layers"] = json.loads(self.rows.to_json(orient="records", double_precision=6))
        content["files"] = sorted(path.name for path in folder.iterdir())
        (folder / "layers.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def layer_report(frame: pd.DataFrame, settings: dict[str, Any]) -> Report:
    """
    Make the report of an analysis. Its summary is about the first scheme.

    :param frame: result of :func:`cat_modifier.analysis.layers.analyze`
    :param settings: settings of the analysis, for the record
    """
    scheme = Scheme.parse(frame["scheme"].iloc[0])
    best = best_transform(frame, scheme.name)
    means = mean_table(frame).rename(index=lambda name: TRANSFORMS[name].label)
    worst = diagnose(frame, scheme, best).head(_WORST).dropna(axis="columns", how="all")
    title = f"Linears that lose most at {scheme.name} with {TRANSFORMS[best].label}, dB"
    return Report(
        frame,
        settings,
        sentences(frame, scheme),
        {
            "Mean measured SQNR, dB": means.rename_axis(columns=None).reset_index(),
            title: worst.rename(columns=_LABELS),
        },
        FIGURES,
        _LAYER_TERMS,
        _DIAGNOSIS_NOTE,
    )


def comparison_report(comparison: Comparison, settings: dict[str, Any]) -> Report:
    """Make the report of a checkpoint that is compared with its original"""
    original, quantized = comparison.perplexity
    worst = comparison.layers.nsmallest(_WORST, "measured_db")
    worst = worst.drop(columns=["in_features", "out_features"])
    end_to_end = {
        "": ["original", "checkpoint"],
        "perplexity": [original, quantized],
        "KL divergence, nats": [0.0, comparison.divergence],
        "top-1 agreement, %": [100.0, 100 * comparison.agreement],
    }
    return Report(
        comparison.layers,
        settings,
        comparison_sentences(comparison),
        {
            f"End to end, {comparison.tokens} tokens": pd.DataFrame(end_to_end),
            "Linears that lose most: SQNR, dB, with what is quantized": worst.rename(
                columns=_LABELS
            ),
        },
        COMPARISON_FIGURES,
        _COMPARISON_TERMS,
        record={
            "perplexity": {"original": original, "checkpoint": quantized},
            "kl_divergence": comparison.divergence,
            "top1_agreement": comparison.agreement,
            "tokens": comparison.tokens,
        },
    )


def _shown_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Move what people look for to the left"""
    first = ["layer", "transform", "scheme", "measured_db", "predicted_db"]
    first = [name for name in first if name in frame]
    return frame[first + [name for name in frame if name not in first]].round(2)
