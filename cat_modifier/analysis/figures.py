# SPDX-License-Identifier: Apache-2.0
"""
The figures of arXiv 2603.04359 for any model, drawn from the rows of an analysis.

Colours differ for any colour vision. Each has its own marker and line style, for print
without colour.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot
from matplotlib.axes import Axes

from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import joint_db, to_db

__all__ = ["COMPARISON_FIGURES", "FIGURES", "Draw", "write_figures"]

Draw = Callable[[pd.DataFrame], object]
"""Function that draws the rows of an analysis in a new figure; its docstring is the caption"""

Style = dict[str, Any]  # arguments of a function that draws

_LABELS = {name: transform.label for name, transform in TRANSFORMS.items()}
_COLORS = dict(zip(_LABELS.values(), sns.color_palette("colorblind"), strict=False))
_MAIN = ("none", "scaling", "hadamard", "cat")
"""Transforms to draw in figures that have no room for all"""

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",
    "svg.hashsalt": "cat-modifier",
}


class MissingDataError(ValueError):
    """The table lacks the schemes or transforms of a figure"""


def _with_roles(frame: pd.DataFrame) -> pd.DataFrame:
    """
    Add columns from the Linear's name, and replace infinite values.

    `role` is the last part, such as `q_proj`. `depth` is the first number in the name, or
    the position of the Linear if there is no number. `label` is the transform's.
    """
    names = frame["layer"]
    position = pd.Series(pd.factorize(names)[0], frame.index)
    depth = names.str.extract(r"(?:^|\.)(\d+)(?:\.|$)")[0].fillna(position).astype(int)
    frame = frame.assign(role=names.str.rpartition(".")[2], depth=depth)
    if "transform" in frame:
        frame = frame.assign(label=frame["transform"].map(_LABELS))
    return frame.replace([math.inf, -math.inf], math.nan)


def _main_transforms(frame: pd.DataFrame, names: tuple[str, ...] = _MAIN) -> pd.DataFrame:
    """Keep the rows of these transforms, or of the first four if there are none"""
    if not frame["transform"].isin(names).any():
        names = tuple(frame["transform"].unique()[:4])
    return frame[frame["transform"].isin(names)]


def _schemes(frame: pd.DataFrame, accept: Callable[[Scheme], bool], need: str) -> list[Scheme]:
    found = [s for s in map(Scheme.parse, frame["scheme"].unique()) if accept(s)]
    if not found:
        raise MissingDataError(f"needs {need}")
    return found


def _by_depth(rows: pd.DataFrame, panels: dict[str, str], title: str | None):
    """
    Draw columns over depth, with one panel per column and role, and one line per `label`.

    :param panels: columns to draw, and the labels of their axes
    """
    common = rows["role"].value_counts().index[:8]  # as many as there is room for
    rows = rows[rows["role"].isin(common)].melt(["role", "depth", "label"], list(panels))
    style: Style = {"hue": "label", "style": "label", "palette": _palette(rows["label"])}
    style |= {"kind": "line", "errorbar": None, "height": 1.65, "aspect": 1.05}
    sharing = {"sharey": "row", "sharex": "col"}
    grid = sns.relplot(
        rows, x="depth", y="value", row="variable", col="role", facet_kws=sharing, **style
    )
    grid.set_titles("").set_xlabels("layer")
    for axis, role in zip(grid.axes[0], grid.col_names, strict=True):
        axis.set_title(role)
    for axis, label in zip(grid.axes[:, 0], panels.values(), strict=True):
        axis.set_ylabel(label)
    sns.move_legend(grid, "lower center", bbox_to_anchor=(0.5, 1), ncols=8, title=title)


def _palette(labels: pd.Series) -> dict[str, Any]:
    others = dict(zip(labels.unique(), sns.color_palette("colorblind"), strict=False))
    return {label: _COLORS.get(label, others[label]) for label in labels.unique()}


def _diagonal(axis: Axes, *columns: pd.Series):
    values = pd.concat(columns)
    axis.axline((values.min(),) * 2, slope=1, color="grey", linewidth=0.8, zorder=0)


def _legend_beside(axis: Axes, title: str | None = None):
    sns.move_legend(axis, "center left", bbox_to_anchor=(1, 0.5), title=title)


def factors(frame: pd.DataFrame):
    """
    The predicted SQNR of each Linear and its factors. A rotation changes concentration only.
    To change alignment takes a transform that is not a rotation.
    """
    need = "a scheme with as many bits for weights as for activations"
    scheme = _schemes(frame, lambda s: s.bits[0] == s.bits[1], need)[0]
    frame = _main_transforms(frame[frame["scheme"] == scheme.name])
    concentrations = frame["weight_concentration_db"], frame["activation_concentration_db"]
    bits = to_db(12 * (2 ** (scheme.bits[0] or 16) - 1) ** 2)
    panels = {
        "concentration_db": "concentration\nC(x) || C(W), dB",
        "alignment_db": "alignment\nA(x, W), dB",
        "predicted_db": f"{scheme.name} SQNR, dB\n(both + {bits:.1f})",
    }
    _by_depth(frame.assign(concentration_db=joint_db(*concentrations)), panels, None)


def predicted_against_measured(frame: pd.DataFrame):
    """
    Predicted (theorem 2.4) and measured SQNR, one dot per Linear. Names mark the Linears
    farthest off the diagonal.
    """
    frame = _main_transforms(frame, ("none", "hadamard", "cat"))
    style: Style = {"hue": "label", "style": "label", "palette": _palette(frame["label"])}
    style |= {"height": 3.4, "facet_kws": {"sharex": False, "sharey": False}, "s": 18}
    wrap = min(4, frame["scheme"].nunique())
    grid = sns.relplot(
        frame, x="predicted_db", y="measured_db", col="scheme", col_wrap=wrap, **style
    )
    grid.set_titles("{col_name}").set_axis_labels("predicted SQNR, dB", "measured SQNR, dB")
    for scheme, axis in grid.axes_dict.items():
        rows = frame[frame["scheme"] == scheme]
        _diagonal(axis, rows["predicted_db"], rows["measured_db"])
        _name_outliers(axis, rows)
    grid.legend.set_title(None)


def _name_outliers(axis: Axes, frame: pd.DataFrame):
    """Write names below the diagonal, where there is room: the outliers are above it"""
    off = (frame["measured_db"] - frame["predicted_db"]).abs()
    outliers = frame.loc[off[off > 3].nlargest(3).index].sort_values("measured_db")
    arrow: Style = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
    text: Style = {"horizontalalignment": "right", "fontsize": 7, "arrowprops": arrow}
    for position, row in enumerate(outliers.itertuples()):
        ends = (row.predicted_db, row.measured_db), (0.98, 0.03 + 0.07 * position)
        axis.annotate(f"{row.depth} {row.role}", *ends, textcoords="axes fraction", **text)


def activations_against_weights(frame: pd.DataFrame):
    """
    The error of weights against the error of activations, per scheme. Small dots are Linears,
    large dots are their mean.
    """
    need = "a scheme that quantizes both weights and activations"
    schemes = [scheme.name for scheme in _schemes(frame, lambda s: None not in s.bits, need)]
    frame = _main_transforms(frame[frame["scheme"].isin(schemes)])
    x, y = "measured_weights_db", "measured_activations_db"
    axis = pyplot.figure(figsize=(6.2, 5.2)).subplots()
    style: Style = {"hue": "label", "style": "scheme", "palette": _palette(frame["label"])}
    sns.scatterplot(frame, x=x, y=y, ax=axis, s=8, alpha=0.3, legend=False, **style)
    means = frame.groupby(["label", "scheme"], sort=False)[[x, y]].mean().reset_index()
    sns.scatterplot(means, x=x, y=y, ax=axis, s=70, zorder=3, **style)
    low, high = axis.get_xlim(), axis.get_ylim()
    grid = np.meshgrid(np.linspace(*low, 200), np.linspace(*high, 200))
    joint = joint_db(*grid)
    levels = np.arange(math.ceil(joint.min() / 6) * 6, joint.max(), 6)
    lines = axis.contour(*grid, joint, levels, colors="grey", linewidths=0.6, zorder=0)
    axis.clabel(lines, fmt="%d dB", fontsize=7)
    bits = 20 * math.log10((2**8 - 1) / (2**4 - 1))
    start = low[0] + 0.05 * (low[1] - low[0]), high[0] + 0.04 * (high[1] - high[0])
    arrow: Style = {"arrowstyle": "->", "color": "grey"}
    axis.annotate("", (start[0] + bits, start[1]), start, arrowprops=arrow)
    label = f"8 weight bits and not 4: {bits:.1f} dB"
    axis.annotate(label, start, (0, 4), textcoords="offset points")
    axis.set(xlim=low, xlabel="SQNR with quantized weights, dB")
    axis.set(ylim=high, ylabel="SQNR with quantized activations, dB")
    _legend_beside(axis, "(joint SQNR: grey lines)")


def concentrations(frame: pd.DataFrame):
    """
    How well weights and activations fill their range, over all Linears: quartiles, and the
    levels of known distributions.
    """
    need = "a scheme that quantizes both weights and activations"
    scheme = _schemes(frame, lambda s: None not in s.bits, need)[0]
    frame = frame[frame["scheme"] == scheme.name]
    sizes = sorted({int(frame["in_features"].min()), int(frame["in_features"].max())})
    figure = pyplot.figure(figsize=(9, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    style: Style = {"hue": "label", "palette": _palette(frame["label"]), "fliersize": 2}
    args: Any
    for axis, column, args, title in (
        (axes[0], "weight_concentration_db", scheme.weights, "weights C(W)"),
        (axes[1], "activation_concentration_db", scheme.activations, "activations C(x)"),
    ):
        sns.boxplot(frame, x="label", y=column, ax=axis, boxprops={"alpha": 0.5}, **style)
        axis.set_xticks(axis.get_xticks(), frame["label"].unique(), rotation=35, ha="right")
        for data, hatch in (("normal", "///"), ("laplace", "...")):
            levels = [
                to_db(expected_concentration(data, size, args.symmetric, args.group_size))
                for size in sizes
            ]
            band: Style = {"facecolor": "none", "edgecolor": "grey", "hatch": hatch}
            label = f"{data.capitalize()} data, d = {' to '.join(map(str, sizes))}"
            ends = min(levels) - 0.04, max(levels) + 0.04
            axis.axhspan(*ends, zorder=0, linewidth=0, label=label, **band)
        axis.set(title=title, xlabel="", ylabel="concentration, dB")
        axis.legend(loc="lower right", fontsize=7)


def alignments(frame: pd.DataFrame):
    """
    Alignment of all Linears, and the region that transforms can reach if no other Linear
    reads the input. Rotations do not change alignment: equal lines are drawn once.
    """
    frame = frame[frame["scheme"] == frame["scheme"].iloc[0]]
    first = frame[frame["transform"] == frame["transform"].iloc[0]]
    share = np.linspace(0, 100, len(first))
    axis = pyplot.figure(figsize=(6.8, 4.4)).subplots()
    lower = floor = min(frame["alignment_db"].min(), first["achievable_block_db"].min()) - 1
    for column, color, label in (
        ("achievable_block_db", "#009E73", "achievable with blocks"),
        ("achievable_full_db", "#56B4E9", "achievable at all"),
    ):
        if first[column].notna().any():
            values = np.sort(first[column])
            axis.fill_between(
                share, lower, values, color=color, alpha=0.15, linewidth=0, label=label
            )
            lower = values
    groups = frame.groupby("label", sort=False)["alignment_db"]
    lines = pd.DataFrame({label: np.sort(values) for label, values in groups}, share)
    lines = lines.T.round(1).drop_duplicates().T
    sns.lineplot(lines, ax=axis, palette=_palette(pd.Series(lines.columns)))
    axis.set(xlabel="Linears, sorted by alignment, %", ylabel="alignment A(x, W), dB")
    axis.set_ylim(bottom=floor)
    _legend_beside(axis)


def fewer_bits(frame: pd.DataFrame):
    """Few bits with CAT against more bits without a transform."""
    need = "the transforms none and cat, and schemes such as W4A4 and W6A6"
    schemes = _schemes(frame, lambda s: s.bits[0] == s.bits[1] and (s.bits[0] or 16) < 8, need)
    if len(schemes) < 2 or not {"none", "cat"} <= set(frame["transform"]):
        raise MissingDataError(f"needs {need}")
    few, *_, many = (s.name for s in sorted(schemes, key=lambda s: s.bits))
    frame = frame.set_index("layer")
    with_cat = frame[(frame["scheme"] == few) & (frame["transform"] == "cat")]
    without = frame[(frame["scheme"] == many) & (frame["transform"] == "none")]
    y, x = with_cat["measured_db"], without["measured_db"]
    axis = pyplot.figure(figsize=(5.8, 4.4)).subplots()
    roles: Style = {"hue": with_cat["role"], "style": with_cat["role"]}
    sns.scatterplot(x=x, y=y, ax=axis, palette=_palette(with_cat["role"]), **roles)
    _diagonal(axis, x, y)
    title = f"{few} with CAT is better for {(y > x).mean():.0%} of the Linears"
    axis.set_title(title, fontsize=9)
    axis.set(xlabel=f"measured SQNR at {many} without a transform, dB")
    axis.set(ylabel=f"measured SQNR at {few} with CAT, dB")
    _legend_beside(axis)


def checkpoint_layers(frame: pd.DataFrame):
    """
    SQNR of each Linear of the checkpoint, with the input of its original. Accumulated: inside
    the quantized model, after the errors of the Linears before it.
    """
    labels = {
        "measured_weights_db": "weights",
        "measured_activations_db": "activations",
        "measured_db": "both",
        "accumulated_db": "both, accumulated",
    }
    rows = frame.rename(columns=labels).melt(
        ["role", "depth"], list(labels.values()), "label", "db"
    )
    _by_depth(rows, {"db": "SQNR of the output, dB"}, "quantized:")


FIGURES: dict[str, Draw] = {
    "1-factors": factors,
    "2-predicted-and-measured": predicted_against_measured,
    "3-weights-and-activations": activations_against_weights,
    "4-concentration": concentrations,
    "5-alignment": alignments,
    "6-fewer-bits": fewer_bits,
}
COMPARISON_FIGURES: dict[str, Draw] = {"1-checkpoint": checkpoint_layers}


def write_figures(
    figures: dict[str, Draw], frame: pd.DataFrame, folder: Path
) -> dict[str, str]:
    """Write each figure as PNG and SVG; return why others cannot be drawn, by name"""
    missing = {}
    frame = _with_roles(frame)
    for name, draw in figures.items():
        with mpl.rc_context(_SETTINGS):
            try:
                draw(frame)
            except MissingDataError as error:
                missing[name] = str(error)
                continue
            pyplot.savefig(folder / f"{name}.png", dpi=160)
            pyplot.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close()
    return missing
