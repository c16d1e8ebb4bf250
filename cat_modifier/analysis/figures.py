# SPDX-License-Identifier: Apache-2.0
"""
The figures of arXiv 2603.04359 for any model, drawn from the rows of an analysis.

The docstring of a figure's function is its caption in the report.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart. Each
has its own marker and line style, for print without colour.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.transforms import TRANSFORMS
from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import parallel_sum, to_db

__all__ = ["COMPARISON_FIGURES", "FIGURES", "caption", "write_figures"]

_STYLES = [
    ("#000000", "o", "-"),
    ("#E69F00", "s", ":"),
    ("#0072B2", "^", "-."),
    ("#009E73", "v", "-"),
    ("#CC79A7", "P", ":"),
    ("#D55E00", "D", "--"),
    ("#56B4E9", "X", "-."),
    ("#8C8C00", "<", (0, (1, 3))),
    ("#7F7F7F", ">", (0, (6, 2))),
]
"""Colour, marker and line style"""

_MARKERS = "osD^vPX"
_MAIN = ("none", "scaling", "hadamard", "cat")
"""Transforms in figures that would be crowded with all"""

_SETTINGS = {
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
    Add `role`, the last part of a Linear's name as in `q_proj`, and `depth`, the first
    number in its name or, without one, its position.
    """
    position = {name: i for i, name in enumerate(frame["layer"].unique())}
    numbers = {name: _number(name) for name in position}
    return frame.assign(
        role=frame["layer"].str.rpartition(".")[2],
        depth=[int(numbers[name] or position[name]) for name in frame["layer"]],
    )


def _number(layer: str) -> str | None:
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return match and match[1]


def _main_roles(frame: pd.DataFrame) -> list[str]:
    """The roles with the most Linears, in the order of the model, as many as there is room"""
    common = set(frame["role"].value_counts().index[:8])
    return [role for role in frame["role"].unique() if role in common]


def _style(transform: str) -> tuple[str, str, str]:
    return _STYLES[list(TRANSFORMS).index(transform) % len(_STYLES)]


def _label(transform: str) -> str:
    return TRANSFORMS[transform].label


def _main_transforms(frame: pd.DataFrame) -> list[str]:
    found = list(frame["transform"].unique())
    return [name for name in _MAIN if name in found] or found[:4]


def _schemes(frame: pd.DataFrame) -> list[Scheme]:
    return [Scheme.parse(name) for name in frame["scheme"].unique()]


def _is_equal(scheme: Scheme) -> bool:
    """Whether weights and activations have the same number of bits"""
    return len(set(scheme.bits)) == 1


def _line(axis: Axes, x: Sequence, y: Sequence, transform: str, size: int, markers: int):
    """Draw the values of a transform"""
    color, marker, line = _style(transform)
    axis.plot(
        x,
        y,
        linestyle=line,
        color=color,
        marker=marker,
        markersize=size,
        markevery=max(1, len(x) // markers),
        label=_label(transform),
    )


def _dots(axis: Axes, x: pd.Series, y: pd.Series, style: tuple[str, str, str], label: str):
    shape = {"s": 14, "marker": style[1], "facecolors": "none", "linewidths": 0.8}
    axis.scatter(x, y, edgecolors=style[0], label=label, **shape)


def _diagonal(axis: Axes, x: pd.Series, y: pd.Series):
    values = np.concatenate([x, y])
    values = values[np.isfinite(values)]
    if values.size:
        ends = values.min() - 1, values.max() + 1
        axis.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)


def _legend_above(figure: Figure, axis: Axes, title: str | None = None):
    handles, labels = axis.get_legend_handles_labels()
    position = {"loc": "outside upper center", "ncols": len(labels)}
    figure.legend(handles, labels, title=title, **position)


def _legend_beside(axis: Axes, title: str | None = None):
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), title=title)


def factors(frame: pd.DataFrame) -> Figure:
    """
    The predicted SQNR of each Linear and its factors. A rotation changes concentration
    alone; alignment needs a transform that is no rotation.
    """
    scheme = next(filter(_is_equal, _schemes(frame)), None)
    if scheme is None:
        raise MissingDataError(
            "needs a scheme with as many bits for weights as for activations"
        )
    frame = _with_roles(frame[frame["scheme"] == scheme.name])
    roles = _main_roles(frame)
    bits = to_db(12 * (2 ** scheme.bits[0] - 1) ** 2)
    panels: list[tuple[str, Callable[[pd.DataFrame], Sequence[float]]]] = [
        ("concentration\nC(x) || C(W), dB", _joint_concentration),
        ("alignment\nA(x, W), dB", lambda rows: rows["alignment_db"]),
        (f"{scheme.name} SQNR, dB\n(both + {bits:.1f})", lambda rows: rows["predicted_db"]),
    ]
    figure = Figure(figsize=(1.2 + 1.75 * len(roles), 6.5))
    axes = figure.subplots(len(panels), len(roles), sharex="col", sharey="row", squeeze=False)
    for column, role in zip(axes.T, roles, strict=True):
        for transform in _main_transforms(frame):
            rows = frame[(frame["role"] == role) & (frame["transform"] == transform)]
            rows = rows.groupby("depth", as_index=False).mean(numeric_only=True)
            for axis, (_, values) in zip(column, panels, strict=True):
                _line(axis, rows["depth"], values(rows), transform, size=3, markers=6)
        column[0].set_title(role)
        column[-1].set_xlabel("layer")
    for axis, (label, _) in zip(axes[:, 0], panels, strict=True):
        axis.set_ylabel(label)
    _legend_above(figure, axes[0, 0])
    return figure


def _joint_concentration(rows: pd.DataFrame) -> list[float]:
    return [
        to_db(parallel_sum(10 ** (w / 10), 10 ** (x / 10)))
        for w, x in zip(
            rows["weight_concentration_db"], rows["activation_concentration_db"], strict=True
        )
    ]


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
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(schemes) :]:
        axis.remove()
    for axis, scheme in zip(axes, schemes, strict=False):
        shown = frame[(frame["scheme"] == scheme) & frame["transform"].isin(transforms)]
        for name in transforms:
            rows = shown[shown["transform"] == name]
            dots = rows["predicted_db"], rows["measured_db"]
            _dots(axis, *dots, _style(name), _label(name))
        _diagonal(axis, shown["predicted_db"], shown["measured_db"])
        _name_outliers(axis, shown)
        axis.set_title(scheme)
        axis.set_xlabel("predicted SQNR, dB")
    figure.axes[0].set_ylabel("measured SQNR, dB")
    figure.axes[0].legend(loc="upper left", fontsize=8)
    return figure


def _name_outliers(axis: Axes, frame: pd.DataFrame):
    """Write names below the diagonal, where there is room: the outliers are above it"""
    off = (frame["measured_db"] - frame["predicted_db"]).abs()
    outliers = frame.loc[off[off > 3].nlargest(3).index].sort_values("measured_db")
    for position, row in enumerate(outliers.itertuples()):
        number = _number(row.layer)
        axis.annotate(
            f"{number + ' ' if number else ''}{row.layer.rpartition('.')[2]}",
            (row.predicted_db, row.measured_db),
            xytext=(0.98, 0.03 + 0.07 * position),
            textcoords="axes fraction",
            horizontalalignment="right",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5},
        )


def activations_against_weights(frame: pd.DataFrame) -> Figure:
    """
    Which of the two errors is larger, and what more bits do: small dots are Linears, large
    ones their mean.
    """
    schemes = [scheme.name for scheme in _schemes(frame) if None not in scheme.bits]
    if not schemes:
        raise MissingDataError("needs a scheme that quantizes both weights and activations")
    markers = dict(zip(schemes, itertools.cycle(_MARKERS), strict=False))
    figure = Figure(figsize=(6.2, 5.2))
    axis = figure.subplots()
    for transform in _main_transforms(frame):
        color, label = _style(transform)[0], _label(transform)
        means = {}
        for scheme, marker in markers.items():
            rows = frame[(frame["transform"] == transform) & (frame["scheme"] == scheme)]
            x, y = rows["measured_weights_db"], rows["measured_activations_db"]
            axis.scatter(x, y, s=5, marker=marker, color=color, alpha=0.18, linewidths=0)
            means[scheme] = x.mean(), y.mean()
        for scheme, mean in means.items():
            style = {"color": color, "edgecolors": "white", "zorder": 3}
            axis.scatter(*mean, s=60, marker=markers[scheme], **style)
        text = {"textcoords": "offset points", "fontsize": 7, "color": color}
        axis.annotate(label, means[schemes[0]], xytext=(6, -3), **text)
        axis.plot([], [], linestyle="none", marker="s", color=color, label=label)
    for scheme, marker in markers.items():
        axis.plot([], [], " ", marker=marker, color="grey", label=scheme)
    low, high = axis.get_xlim(), axis.get_ylim()
    x, y = np.meshgrid(np.linspace(*low, 200), np.linspace(*high, 200))
    joint = -10 * np.log10(10 ** (-x / 10) + 10 ** (-y / 10))
    levels = np.arange(math.ceil(joint.min() / 6) * 6, joint.max(), 6)
    lines = axis.contour(x, y, joint, levels, colors="grey", linewidths=0.6, zorder=0)
    axis.clabel(lines, fmt="%d dB", fontsize=7)
    bits = 20 * math.log10((2**8 - 1) / (2**4 - 1))
    start = low[0] + 0.05 * (low[1] - low[0]), high[0] + 0.04 * (high[1] - high[0])
    arrow = {"arrowstyle": "->", "color": "grey"}
    axis.annotate("", (start[0] + bits, start[1]), start, arrowprops=arrow)
    label = f"8 weight bits and not 4: {bits:.1f} dB"
    axis.annotate(label, start, (0, 4), textcoords="offset points")
    axis.set_xlim(low)
    axis.set_ylim(high)
    axis.set_xlabel("SQNR with quantized weights, dB")
    axis.set_ylabel("SQNR with quantized activations, dB")
    _legend_beside(axis, "(joint SQNR: grey lines)")
    return figure


def concentrations(frame: pd.DataFrame) -> Figure:
    """
    How well weights and activations fill their range, over all Linears: quartiles, and the
    levels of known distributions.
    """
    scheme = next((one for one in _schemes(frame) if None not in one.bits), None)
    if scheme is None:
        raise MissingDataError("needs a scheme that quantizes both weights and activations")
    frame = frame[frame["scheme"] == scheme.name]
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, column, args, title in (
        (left, "weight_concentration_db", scheme.weights, "weights C(W)"),
        (right, "activation_concentration_db", scheme.activations, "activations C(x)"),
    ):
        _boxes(axis, frame, column)
        sizes = sorted(frame["in_features"].unique())
        sizes = [int(size) for size in dict.fromkeys((sizes[0], sizes[-1]))]
        for distribution, hatch in (("normal", "///"), ("laplace", "...")):
            levels = [
                to_db(expected_concentration(distribution, d, args.symmetric, args.group_size))
                for d in sizes
            ]
            axis.axhspan(
                min(levels) - 0.04,
                max(levels) + 0.04,
                facecolor="none",
                edgecolor="grey",
                hatch=hatch,
                linewidth=0,
                zorder=0,
                label=f"{distribution.capitalize()} data, d = {' to '.join(map(str, sizes))}",
            )
        axis.set_title(title)
        axis.legend(loc="lower right", fontsize=7)
    left.set_ylabel("concentration, dB")
    return figure


def _boxes(axis: Axes, frame: pd.DataFrame, column: str):
    transforms = list(frame["transform"].unique())
    values = [frame.loc[frame["transform"] == t, column].dropna() for t in transforms]
    boxes = axis.boxplot(values, widths=0.6, patch_artist=True, flierprops={"markersize": 2})
    for box, median, transform in zip(
        boxes["boxes"], boxes["medians"], transforms, strict=True
    ):
        box.set(facecolor=_style(transform)[0], alpha=0.45)
        median.set(color="black")
    labels = [_label(transform) for transform in transforms]
    axis.set_xticks(range(1, len(transforms) + 1), labels, rotation=35, ha="right")


def alignments(frame: pd.DataFrame) -> Figure:
    """
    Alignment over all Linears, and the region that transforms can reach if each Linear has
    its input for itself. Rotations leave it as it is: equal lines are drawn once.
    """
    frame = frame[frame["scheme"] == frame["scheme"].iloc[0]]
    first = frame[frame["transform"] == frame["transform"].iloc[0]]
    share = np.linspace(0, 100, len(first))
    figure = Figure(figsize=(6.8, 4.4))
    axis = figure.subplots()
    floor = min(frame["alignment_db"].min(), first["achievable_block_db"].min()) - 1
    block = np.sort(first["achievable_block_db"])
    axis.fill_between(share, floor, block, color="#009E73", alpha=0.13, linewidth=0)
    axis.plot(share, block, color="#009E73", linewidth=0.8, label="achievable with blocks")
    if first["achievable_full_db"].notna().all():
        full = np.sort(first["achievable_full_db"])
        axis.fill_between(share, block, full, color="#56B4E9", alpha=0.18, linewidth=0)
        axis.plot(share, full, color="#56B4E9", linewidth=0.8, label="achievable at all")
    # a rotation keeps the alignment of what it rotates: only the first of equal lines is drawn
    drawn: list[np.ndarray] = []
    for transform in frame["transform"].unique():
        values = np.sort(frame.loc[frame["transform"] == transform, "alignment_db"])
        if not any(np.allclose(values, other, atol=0.02) for other in drawn):
            drawn.append(values)
            _line(axis, share, values, transform, size=4, markers=12)
    axis.set_xlabel("Linears, sorted by alignment, %")
    axis.set_ylabel("alignment A(x, W), dB")
    axis.set_ylim(bottom=floor)
    _legend_beside(axis)
    return figure


def fewer_bits(frame: pd.DataFrame) -> Figure:
    """Few bits with CAT against more bits without a transform."""
    schemes = [s for s in _schemes(frame) if _is_equal(s) and s.bits[0] < 8]
    schemes = [scheme.name for scheme in sorted(schemes, key=lambda scheme: scheme.bits)]
    if len(schemes) < 2 or not {"none", "cat"} <= set(frame["transform"]):
        raise MissingDataError(
            "needs the transforms none and cat, and schemes such as W4A4 and W6A6"
        )
    few, many = schemes[0], schemes[-1]
    frame = _with_roles(frame).set_index("layer")
    with_cat = frame[(frame["scheme"] == few) & (frame["transform"] == "cat")]
    without = frame[(frame["scheme"] == many) & (frame["transform"] == "none")]
    y, x = with_cat["measured_db"], without["measured_db"]
    figure = Figure(figsize=(5.8, 4.4))
    axis = figure.subplots()
    for role, style in zip(with_cat["role"].unique(), itertools.cycle(_STYLES), strict=False):
        layers = with_cat.index[with_cat["role"] == role]
        _dots(axis, x[layers], y[layers], style, role)
    _diagonal(axis, x, y)
    better = (y > x).mean()
    axis.set_title(f"{few} with CAT is better for {better:.0%} of the Linears", fontsize=9)
    axis.set_xlabel(f"measured SQNR at {many} without a transform, dB")
    axis.set_ylabel(f"measured SQNR at {few} with CAT, dB")
    _legend_beside(axis)
    return figure


def checkpoint_layers(frame: pd.DataFrame) -> Figure:
    """
    SQNR of each Linear of the checkpoint: with the input of its original, and (accumulated)
    within the quantized model, after the errors of all before it.
    """
    frame = _with_roles(frame)
    roles = _main_roles(frame)
    figure = Figure(figsize=(1.2 + 1.75 * len(roles), 3.2))
    axes = figure.subplots(1, len(roles), sharey=True, squeeze=False)[0]
    for axis, role in zip(axes, roles, strict=True):
        rows = frame[frame["role"] == role]
        for column, label, (color, _, line) in (
            ("measured_weights_db", "weights", _STYLES[1]),
            ("measured_activations_db", "activations", _STYLES[2]),
            ("measured_db", "both", _STYLES[0]),
            ("accumulated_db", "both, accumulated", _STYLES[5]),
        ):
            values = rows[column].replace(math.inf, math.nan).groupby(rows["depth"]).mean()
            axis.plot(values.index, values, linestyle=line, color=color, label=label)
        axis.set_title(role)
        axis.set_xlabel("layer")
    axes[0].set_ylabel("SQNR of the output, dB")
    _legend_above(figure, axes[0], title="quantized:")
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "1-factors": factors,
    "2-predicted-and-measured": predicted_against_measured,
    "3-weights-and-activations": activations_against_weights,
    "4-concentration": concentrations,
    "5-alignment": alignments,
    "6-fewer-bits": fewer_bits,
}
COMPARISON_FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "1-checkpoint": checkpoint_layers,
}


def caption(draw: Callable[[pd.DataFrame], Figure]) -> str:
    """The text below a figure: the docstring of its function"""
    return " ".join(draw.__doc__.split())


def write_figures(
    figures: dict[str, Callable[[pd.DataFrame], Figure]], frame: pd.DataFrame, folder: Path
) -> dict[str, str]:
    """
    Write each figure as PNG and as SVG.

    :return: reasons why figures cannot be drawn from the table, by name
    """
    missing = {}
    for name, draw in figures.items():
        with mpl.rc_context(_SETTINGS):
            try:
                figure = draw(frame)
            except MissingDataError as error:
                missing[name] = str(error)
                continue
            figure.savefig(folder / f"{name}.png", dpi=160)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return missing
