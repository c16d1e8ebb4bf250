# SPDX-License-Identifier: Apache-2.0
"""The files of a report: tables, figures, and a page that needs no network"""

import base64
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import itables.options
import pandas as pd
import torch
from itables.javascript import generate_init_offline_itables_html
from jinja2 import Environment, PackageLoader
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from cat_modifier.analysis.comparison import Comparison
from cat_modifier.analysis.figures import (
    CAPTIONS,
    COMPARISON_CAPTIONS,
    COMPARISON_FIGURES,
    FIGURES,
    write_figures,
)
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.summary import (
    best_transform,
    comparison_sentences,
    diagnose,
    mean_table,
    sentences,
)
from cat_modifier.analysis.transforms import TRANSFORMS

__all__ = [
    "comparison_tables",
    "layer_tables",
    "write_comparison_report",
    "write_layer_report",
]

_WORST = 12
"""Linears in the tables of the worst ones"""

_DIAGNOSIS_LABELS = {
    "layer": "Linear",
    "sqnr": "SQNR",
    "noise": "noise of",
    "limit": "limited by",
    "concentration_loss": "lost to concentration",
    "alignment_loss": "lost to alignment",
    "gain_activations": "gain by A8",
    "gain_weights": "gain by W8",
    "gain_full": "gain by one block",
}

_ERROR_LABELS = {
    "layer": "Linear",
    "measured_weights_db": "weights",
    "measured_activations_db": "activations",
    "measured_db": "both",
    "accumulated_db": "accumulated",
}

_GAINS = {
    "gain_activations": "8-bit activations",
    "gain_weights": "8-bit weights",
    "gain_full": "one block over the whole input",
}

_DIAGNOSIS_NOTE = (
    "Lost to concentration: against normal data. Lost to alignment: against what blocks of "
    "this size can achieve. Limited by: the larger loss, or bits if there is none above 1 dB."
)

_LAYER_TERMS = (
    "SQNR is the energy of a Linear's output over that of its error: one more bit is 6 dB. It "
    "is the sum, in dB, of bits, concentration (how well values fill their range) and "
    "alignment (how well the weight meets the directions in which inputs are large). Measured "
    "on a sample of 128 tokens of each input, which stands for all."
)

_COMPARISON_TERMS = (
    "SQNR is the energy of a Linear's output over that of its error: one more bit is 6 dB. "
    "Accumulated: within the quantized model, after the errors of all Linears before it; all "
    "other columns: with the input that the original has."
)


def layer_tables(frame: pd.DataFrame, schemes: list[Scheme]) -> Group:
    """For the terminal: SQNR of each transform, and the Linears that lose most"""
    best = best_transform(frame, schemes[0].name)
    worst = _without_prefix(diagnose(frame, schemes[0], best)).head(_WORST)
    return Group(
        _rich(_mean_table(frame), "Mean measured SQNR, dB"),
        _rich(
            _readable(worst.drop(columns=["noise", "concentration_loss", "alignment_loss"])),
            f"Linears that lose most at {schemes[0].name} with {TRANSFORMS[best].label}, dB",
            _gains_caption(worst),
        ),
    )


def comparison_tables(comparison: Comparison) -> Group:
    """For the terminal: end to end, and the Linears that lose most"""
    worst = _without_prefix(comparison.layers).nsmallest(_WORST, "measured_db")
    return Group(
        _rich(_end_to_end(comparison), f"{comparison.tokens} tokens"),
        _rich(_named(worst), "Linears that lose most: SQNR, dB, with what is quantized"),
    )


def write_layer_report(
    folder: Path, frame: pd.DataFrame, schemes: list[Scheme], settings: dict[str, Any]
):
    """
    Write `layers.csv`, `layers.json`, the figures as PNG and SVG, and `report.html`.

    :param frame: of :func:`cat_modifier.analysis.layers.analyze`
    :param settings: of the analysis, for the record
    """
    missing = write_figures(FIGURES, frame, folder)
    best = best_transform(frame, schemes[0].name)
    worst = diagnose(frame, schemes[0], best).head(_WORST)
    _write(
        folder,
        frame,
        settings,
        summary=sentences(frame, schemes[0]),
        tables={
            "Mean measured SQNR, dB": _mean_table(frame),
            f"Linears that lose most at {schemes[0].name} with {TRANSFORMS[best].label}, dB": (
                _readable(worst)
            ),
        },
        terms=_LAYER_TERMS,
        note=f"{_DIAGNOSIS_NOTE} {_gains_caption(worst)}",
        captions=CAPTIONS,
        missing=missing,
    )


def write_comparison_report(folder: Path, comparison: Comparison, settings: dict[str, Any]):
    """The same files for a checkpoint which is compared with its original"""
    missing = write_figures(COMPARISON_FIGURES, comparison.layers, folder)
    end_to_end = _end_to_end(comparison)
    _write(
        folder,
        comparison.layers,
        settings,
        summary=comparison_sentences(comparison),
        terms=_COMPARISON_TERMS,
        tables={
            f"End to end, {comparison.tokens} tokens": end_to_end,
            "Linears that lose most: SQNR, dB, with what is quantized": _named(
                comparison.layers.nsmallest(_WORST, "measured_db")
            ),
        },
        captions=COMPARISON_CAPTIONS,
        missing=missing,
        record={
            "perplexity": {
                "original": comparison.perplexity[0],
                "checkpoint": comparison.perplexity[1],
            },
            "kl_divergence": comparison.divergence,
            "top1_agreement": comparison.agreement,
            "tokens": comparison.tokens,
        },
    )


def _write(
    folder: Path,
    frame: pd.DataFrame,
    settings: dict[str, Any],
    summary: list[str],
    terms: str,
    tables: dict[str, pd.DataFrame],
    captions: dict[str, str],
    missing: dict[str, str],
    note: str = "",
    record: dict[str, Any] | None = None,
):
    versions = {name: version(name) for name in ("cat-modifier", "torch", "transformers")}
    versions["python"] = platform.python_version()
    header = {"settings": settings, "versions": versions, **(record or {})}
    page = Environment(loader=PackageLoader("cat_modifier.analysis", "."), autoescape=True)
    html = page.get_template("report.html.jinja").render(
        settings=settings,
        versions=versions | {"device": _device()},
        summary=summary,
        terms=terms,
        note=note,
        tables={title: _html(table) for title, table in tables.items()},
        figures={
            name: {
                "caption": caption,
                "image": base64.b64encode((folder / f"{name}.svg").read_bytes()).decode(),
            }
            for name, caption in captions.items()
            if name not in missing
        },
        missing=missing,
        scripts=generate_init_offline_itables_html(itables.options.dt_bundle),
        rows=itables.to_html_datatable(
            _shown_first(frame),
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
    frame.to_csv(folder / "layers.csv", index=False)
    # nan and infinite values are null: JSON has neither
    header["layers"] = json.loads(frame.to_json(orient="records", double_precision=6))
    header["files"] = sorted(path.name for path in folder.iterdir())
    (folder / "layers.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _mean_table(frame: pd.DataFrame) -> pd.DataFrame:
    table = mean_table(frame).rename(index=lambda name: TRANSFORMS[name].label)
    return table.rename_axis(columns=None).reset_index()


def _gains_caption(diagnosis: pd.DataFrame) -> str:
    known = [text for name, text in _GAINS.items() if diagnosis[name].notna().any()]
    return f"Gains: of {', of '.join(known)}." if known else ""


def _readable(diagnosis: pd.DataFrame) -> pd.DataFrame:
    return diagnosis.dropna(axis="columns", how="all").rename(columns=_DIAGNOSIS_LABELS)


def _named(layers: pd.DataFrame) -> pd.DataFrame:
    return layers.drop(columns=["in_features", "out_features"]).rename(columns=_ERROR_LABELS)


def _end_to_end(comparison: Comparison) -> pd.DataFrame:
    original, quantized = comparison.perplexity
    return pd.DataFrame(
        {
            "": ["original", "checkpoint"],
            "perplexity": [original, quantized],
            "KL divergence, nats": [0.0, comparison.divergence],
            "top-1 agreement, %": [100.0, 100 * comparison.agreement],
        }
    )


def _shown_first(frame: pd.DataFrame) -> pd.DataFrame:
    """With what people look for on the left"""
    first = ["layer", "transform", "scheme", "measured_db", "predicted_db"]
    first = [name for name in first if name in frame]
    return frame[first + [name for name in frame if name not in first]].round(2)


def _format(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _html(table: pd.DataFrame) -> str:
    return table.map(_format).to_html(index=False, border=0, classes="numbers")


def _without_prefix(frame: pd.DataFrame) -> pd.DataFrame:
    """Names of layers without what all of them begin with"""
    prefix = os.path.commonprefix(list(frame["layer"])).rpartition(".")[0]
    return frame.assign(layer=frame["layer"].str.removeprefix(f"{prefix}."))


def _rich(table: pd.DataFrame, title: str, caption: str | None = None) -> Table:
    result = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for name, dtype in table.dtypes.items():
        is_number = dtype.kind in "fi"
        result.add_column(name, justify="right" if is_number else "left", no_wrap=not is_number)
    for row in table.itertuples(index=False):
        result.add_row(*(escape(_format(value)) for value in row))
    return result
