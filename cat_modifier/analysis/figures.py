# SPDX-License-Identifier: Apache-2.0
"""
The figures of arXiv 2603.04359 for any model, drawn from the rows of an analysis.

The colours of Okabe and Ito differ for any colour vision. Each colour has its own marker and
line style, for print without colour.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.summary import joint_db
from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import to_db

__all__ = ["COMPARISON_FIGURES", "FIGURES", "Draw", "write_figures"]

Draw = Callable[[pd.DataFrame], Figure]
"""Function from the rows of an analysis to a figure; its docstring is the caption"""

Look = dict[str, Any]  # arguments of `plot` and its like

_COLORS = ["#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7"]
_COLORS += ["#D55E00", "#56B4E9", "#8C8C00", "#7F7F7F"]
_MARKERS = "os^vPDX<>"
_LINES = ["-", ":", "-.", "-", ":", "--", "-.", (0, (1, 3)), (0, (6, 2))]
_SCHEME_MARKERS = "osD^vPX"

_MAIN = ("none", "scaling", "hadamard", "cat")
"""Transforms to draw in figures that have no room for all"""

_SETTINGS: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cat-modifier",
}


class MissingDataError(ValueError):
    """The table lacks the schemes or transforms of a figure"""


def _with_roles(frame: pd.DataFrame) -> pd.DataFrame:
    """
    Add columns from the Linear's name.

    `role` is the last part, such as `q_proj`. `depth` is the first number in the name, or
    the position of the Linear if there is no number.
    """
    names = frame["layer"]
    position = pd.Series(pd.factorize(names)[0], frame.index)
    depth = names.str.extract(r"(?:^|\.)(\d+)(?:\.|$)")[0].fillna(position).astype(int)
    return frame.assign(role=names.str.rpartition(".")[2], depth=depth)


def _main_transforms(frame: pd.DataFrame) -> list[str]:
    found = list(frame["transform"].unique())
    return [name for name in _MAIN if name in found] or found[:4]


def _schemes(frame: pd.DataFrame, accept: Callable[[Scheme], bool], need: str) -> list[Scheme]:
    found = [s for s in map(Scheme.parse, frame["scheme"].unique()) if accept(s)]
    if not found:
        raise MissingDataError(f"needs {need}")
    return found


def _look(index: int, label: str) -> Look:
    index = index % len(_COLORS)
    look = {"color": _COLORS[index], "marker": _MARKERS[index], "linestyle": _LINES[index]}
    return look | {"label": label}


def _look_of(transform: str) -> Look:
    return _look(list(TRANSFORMS).index(transform), TRANSFORMS[transform].label)


def _dots(axis: Axes, x: pd.Series, y: pd.Series, look: Look):
    style: Look = {
        "marker": look["marker"],
        "facecolors": "none",
        "edgecolors": look["color"],
    }
    axis.scatter(x, y, s=14, linewidths=0.8, label=look["label"], **style)


def _diagonal(axis: Axes, x: pd.Series, y: pd.Series):
    values = pd.concat([x, y]).replace(math.inf, math.nan)
    ends = values.min() - 1, values.max() + 1
    axis.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)


def _legend_beside(axis: Axes, title: str | None = None):
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=title)


def _by_depth(
    frame: pd.DataFrame, labels: dict[str, str], looks: dict[str, Look], title: str = ""
) -> Figure:
    """
    Draw columns over depth, with one panel per column and role.

    :param labels: columns to draw, and their labels
    :param looks: lines of a panel, by the `line` of a row
    """
    common = frame["role"].value_counts().index[:8]  # as many as there is room for
    roles = [role for role in frame["role"].unique() if role in common]
    figure = Figure(figsize=(1.2 + 1.75 * len(roles), round(1.55 + 1.65 * len(labels), 2)))
    axes = figure.subplots(len(labels), len(roles), sharex="col", sharey="row", squeeze=False)
    for panels, role in zip(axes.T, roles, strict=True):
        for line, look in looks.items():
            rows = frame[(frame["role"] == role) & (frame["line"] == line)]
            rows = rows.groupby("depth")[list(labels)].mean()
            style: Look = {"markersize": 3, "markevery": max(1, len(rows) // 6)}
            for axis, name in zip(panels, labels, strict=True):
                axis.plot(rows.index, rows[name], **look, **style)
        panels[0].set_title(role)
        panels[-1].set_xlabel("layer")
    for axis, label in zip(axes[:, 0], labels.values(), strict=True):
        axis.set_ylabel(label)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(looks), title=title or None)
    return figure


def factors(frame: pd.DataFrame) -> Figure:
    """
    The predicted SQNR of each Linear and its factors. A rotation changes concentration only.
    To change alignment takes a transform that is not a rotation.
    """
    need = "a scheme with as many bits for weights as for activations"
    scheme = _schemes(frame, lambda s: s.bits[0] == s.bits[1], need)[0]
    frame = frame[frame["scheme"] == scheme.name]
    concentrations = frame["weight_concentration_db"], frame["activation_concentration_db"]
    frame = frame.assign(line=frame["transform"], concentration_db=joint_db(*concentrations))
    bits = to_db(12 * (2 ** (scheme.bits[0] or 16) - 1) ** 2)
    labels = {
        "concentration_db": "concentration\nC(x) || C(W), dB",
        "alignment_db": "alignment\nA(x, W), dB",
        "predicted_db": f"{scheme.name} SQNR, dB\n(both + {bits:.1f})",
    }
    looks = {name: _look_of(name) for name in _main_transforms(frame)}
    return _by_depth(frame, labels, looks)


def predicted_against_measured(frame: pd.DataFrame) -> Figure:
    """
    Predicted (theorem 2.4) and measured SQNR, one dot per Linear. Names mark the Linears
    farthest off the diagonal.
    """
    schemes = list(frame["scheme"].unique())
    transforms = [t for t in ("none", "hadamard", "cat") if t in set(frame["transform"])]
    transforms = transforms or _main_transforms(frame)
    columns = min(4, len(schemes))
    lines = math.ceil(len(schemes) / columns)
    figure = Figure(figsize=(3.3 * columns, 3.6 * lines))
    for position, scheme in enumerate(schemes, 1):
        axis = figure.add_subplot(lines, columns, position)
        shown = frame[(frame["scheme"] == scheme) & frame["transform"].isin(transforms)]
        for name in transforms:
            rows = shown[shown["transform"] == name]
            _dots(axis, rows["predicted_db"], rows["measured_db"], _look_of(name))
        _diagonal(axis, shown["predicted_db"], shown["measured_db"])
        _name_outliers(axis, shown)
        axis.set(title=scheme, xlabel="predicted SQNR, dB")
    figure.axes[0].set_ylabel("measured SQNR, dB")
    figure.axes[0].legend(loc="upper left", fontsize=8)
    return figure


def _name_outliers(axis: Axes, frame: pd.DataFrame):
    """Write names below the diagonal, where there is room: the outliers are above it"""
    off = (frame["measured_db"] - frame["predicted_db"]).abs()
    outliers = frame.loc[off[off > 3].nlargest(3).index].sort_values("measured_db")
    arrow: Look = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
    text: Look = {"horizontalalignment": "right", "fontsize": 7, "arrowprops": arrow}
    for position, row in enumerate(outliers.itertuples()):
        ends = (row.predicted_db, row.measured_db), (0.98, 0.03 + 0.07 * position)
        axis.annotate(f"{row.depth} {row.role}", *ends, textcoords="axes fraction", **text)


def activations_against_weights(frame: pd.DataFrame) -> Figure:
    """
    The error of weights against the error of activations, per scheme. Small dots are Linears,
    large dots are their mean.
    """
    need = "a scheme that quantizes both weights and activations"
    schemes = [scheme.name for scheme in _schemes(frame, lambda s: None not in s.bits, need)]
    markers = dict(zip(schemes, itertools.cycle(_SCHEME_MARKERS), strict=False))
    figure = Figure(figsize=(6.2, 5.2))
    axis = figure.subplots()
    for transform in _main_transforms(frame):
        color, label = _look_of(transform)["color"], TRANSFORMS[transform].label
        text: Look = {"textcoords": "offset points", "fontsize": 7, "color": color}
        for scheme, marker in markers.items():
            rows = frame[(frame["transform"] == transform) & (frame["scheme"] == scheme)]
            x, y = rows["measured_weights_db"], rows["measured_activations_db"]
            axis.scatter(x, y, s=5, marker=marker, color=color, alpha=0.18, linewidths=0)
            mean = x.mean(), y.mean()
            white: Look = {"edgecolors": "white", "zorder": 3}
            axis.scatter(*mean, s=60, marker=marker, color=color, **white)
            if scheme == schemes[0]:
                axis.annotate(label, mean, xytext=(6, -3), **text)
        axis.plot([], [], linestyle="none", marker="s", color=color, label=label)
    for scheme, marker in markers.items():
        axis.plot([], [], " ", marker=marker, color="grey", label=scheme)
    low, high = axis.get_xlim(), axis.get_ylim()
    x, y = np.meshgrid(np.linspace(*low, 200), np.linspace(*high, 200))
    joint = joint_db(x, y)
    levels = np.arange(math.ceil(joint.min() / 6) * 6, joint.max(), 6)
    lines = axis.contour(x, y, joint, levels, colors="grey", linewidths=0.6, zorder=0)
    axis.clabel(lines, fmt="%d dB", fontsize=7)
    bits = 20 * math.log10((2**8 - 1) / (2**4 - 1))
    start = low[0] + 0.05 * (low[1] - low[0]), high[0] + 0.04 * (high[1] - high[0])
    arrow: Look = {"arrowstyle": "->", "color": "grey"}
    axis.annotate("", (start[0] + bits, start[1]), start, arrowprops=arrow)
    label = f"8 weight bits and not 4: {bits:.1f} dB"
    axis.annotate(label, start, (0, 4), textcoords="offset points")
    axis.set(xlim=low, xlabel="SQNR with quantized weights, dB")
    axis.set(ylim=high, ylabel="SQNR with quantized activations, dB")
    _legend_beside(axis, "(joint SQNR: grey lines)")
    return figure


def concentrations(frame: pd.DataFrame) -> Figure:
    """
    How well weights and activations fill their range, over all Linears: quartiles, and the
    levels of known distributions.
    """
    need = "a scheme that quantizes both weights and activations"
    scheme = _schemes(frame, lambda s: None not in s.bits, need)[0]
    frame = frame[frame["scheme"] == scheme.name]
    sizes = sorted({int(frame["in_features"].min()), int(frame["in_features"].max())})
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    args: Any
    for axis, column, args, title in (
        (left, "weight_concentration_db", scheme.weights, "weights C(W)"),
        (right, "activation_concentration_db", scheme.activations, "activations C(x)"),
    ):
        groups = dict(list(frame.groupby("transform", sort=False)[column]))
        style: Look = {"patch_artist": True, "flierprops": {"markersize": 2}}
        boxes = axis.boxplot([group.dropna() for group in groups.values()], widths=0.6, **style)
        for box, median, name in zip(boxes["boxes"], boxes["medians"], groups, strict=True):
            box.set(facecolor=_look_of(name)["color"], alpha=0.45)
            median.set(color="black")
        labels = [TRANSFORMS[name].label for name in groups]
        axis.set_xticks(range(1, len(groups) + 1), labels, rotation=35, ha="right")
        for data, hatch in (("normal", "///"), ("laplace", "...")):
            levels = [
                to_db(expected_concentration(data, size, args.symmetric, args.group_size))
                for size in sizes
            ]
            style = {"facecolor": "none", "edgecolor": "grey", "hatch": hatch, "linewidth": 0}
            label = f"{data.capitalize()} data, d = {' to '.join(map(str, sizes))}"
            ends = min(levels) - 0.04, max(levels) + 0.04
            axis.axhspan(*ends, zorder=0, label=label, **style)
        axis.set_title(title)
        axis.legend(loc="lower right", fontsize=7)
    left.set_ylabel("concentration, dB")
    return figure


def alignments(frame: pd.DataFrame) -> Figure:
    """
    Alignment of all Linears, and the region that transforms can reach if no other Linear
    reads the input. Rotations do not change alignment: equal lines are drawn once.
    """
    frame = frame[frame["scheme"] == frame["scheme"].iloc[0]]
    first = frame[frame["transform"] == frame["transform"].iloc[0]]
    share = np.linspace(0, 100, len(first))
    figure = Figure(figsize=(6.8, 4.4))
    axis = figure.subplots()
    lower = floor = min(frame["alignment_db"].min(), first["achievable_block_db"].min()) - 1
    for column, color, alpha, label in (
        ("achievable_block_db", "#009E73", 0.13, "achievable with blocks"),
        ("achievable_full_db", "#56B4E9", 0.18, "achievable at all"),
    ):
        if first[column].notna().any():
            values = np.sort(first[column])
            axis.fill_between(share, lower, values, color=color, alpha=alpha, linewidth=0)
            axis.plot(share, values, color=color, linewidth=0.8, label=label)
            lower = values
    drawn: list[np.ndarray] = []
    for transform in frame["transform"].unique():
        values = np.sort(frame.loc[frame["transform"] == transform, "alignment_db"])
        if not any(np.allclose(values, other, atol=0.02) for other in drawn):
            drawn.append(values)
            style: Look = {"markersize": 4, "markevery": max(1, len(share) // 12)}
            axis.plot(share, values, **_look_of(transform), **style)
    axis.set(xlabel="Linears, sorted by alignment, %", ylabel="alignment A(x, W), dB")
    axis.set_ylim(bottom=floor)
    _legend_beside(axis)
    return figure


def fewer_bits(frame: pd.DataFrame) -> Figure:
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
    figure = Figure(figsize=(5.8, 4.4))
    axis = figure.subplots()
    for index, (role, rows) in enumerate(with_cat.groupby("role", sort=False)):
        _dots(axis, x[rows.index], rows["measured_db"], _look(index, role))
    _diagonal(axis, x, y)
    title = f"{few} with CAT is better for {(y > x).mean():.0%} of the Linears"
    axis.set_title(title, fontsize=9)
    axis.set(xlabel=f"measured SQNR at {many} without a transform, dB")
    axis.set(ylabel=f"measured SQNR at {few} with CAT, dB")
    _legend_beside(axis)
    return figure


def checkpoint_layers(frame: pd.DataFrame) -> Figure:
    """
    SQNR of each Linear of the checkpoint, with the input of its original. Accumulated: inside
    the quantized model, after the errors of the Linears before it.
    """
    looks = {
        "measured_weights_db": _look(1, "weights"),
        "measured_activations_db": _look(2, "activations"),
        "measured_db": _look(0, "both"),
        "accumulated_db": _look(5, "both, accumulated"),
    }
    looks = {line: look | {"marker": None} for line, look in looks.items()}
    rows = frame.replace(math.inf, math.nan).melt(["role", "depth"], list(looks), "line", "db")
    return _by_depth(rows, {"db": "SQNR of the output, dB"}, looks, "quantized:")


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
                figure = draw(frame)
            except MissingDataError as error:
                missing[name] = str(error)
            else:
                figure.savefig(folder / f"{name}.png", dpi=160)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return missing
