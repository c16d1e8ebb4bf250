# SPDX-License-Identifier: Apache-2.0
"""
The figures of arXiv 2603.04359 for any model: each a function of the table of
:class:`cat_modifier.analysis.measure.LayerResult` rows.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; each
goes with a marker and a line style of its own, for print without colour.
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

from cat_modifier.analysis.transforms import TRANSFORMS
from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import parallel_sum, to_db

__all__ = [
    "CAPTIONS",
    "COMPARISON_CAPTIONS",
    "COMPARISON_FIGURES",
    "FIGURES",
    "MissingData",
    "with_roles",
    "write_figures",
]

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
_MARKERS = "osD^vPX"
_MAIN = ("none", "scaling", "hadamard", "cat")
"""Of all transforms, those in figures which would be crowded with all"""

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


class MissingData(ValueError):
    """The table lacks the schemes or transforms which a figure is about"""


def with_roles(frame: pd.DataFrame) -> pd.DataFrame:
    """
    Add `role`, the last part of a Linear's name as in `q_proj`, and `depth`, the first
    number in its name or, without one, its position.
    """
    position = {name: i for i, name in enumerate(frame["layer"].unique())}
    numbers = {name: re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in position}
    return frame.assign(
        role=frame["layer"].str.rpartition(".")[2],
        depth=[int(numbers[n][1]) if numbers[n] else position[n] for n in frame["layer"]],
    )


def _style(transform: str) -> tuple[str, str, str]:
    return _STYLES[list(TRANSFORMS).index(transform) % len(_STYLES)]


def _label(transform: str) -> str:
    return TRANSFORMS[transform].label


def _main_transforms(frame: pd.DataFrame) -> list[str]:
    found = list(frame["transform"].unique())
    return [name for name in _MAIN if name in found] or found[:4]


def _bits(scheme: str) -> tuple[int, int]:
    weights, activations = re.fullmatch(r"W(\d+)(?:G\d+)?A(\d+)(?:G\d+)?", scheme).groups()
    return int(weights), int(activations)


def _scheme_of_equal_bits(frame: pd.DataFrame) -> str:
    for scheme in frame["scheme"].unique():
        weights, activations = _bits(scheme)
        if weights == activations < 16:
            return scheme
    raise MissingData("needs a scheme with as many bits for weights as for activations")


def factors(frame: pd.DataFrame) -> Figure:
    """Figure 1: SQNR factorised into bit width, concentration and alignment"""
    scheme = _scheme_of_equal_bits(frame)
    frame = with_roles(frame[frame["scheme"] == scheme])
    roles = _main_roles(frame)
    bits = to_db(12 * (2 ** _bits(scheme)[0] - 1) ** 2)
    panels: list[tuple[str, Callable[[pd.DataFrame], Sequence[float]]]] = [
        ("concentration\nC(x) || C(W), dB", _joint_concentration),
        ("alignment\nA(x, W), dB", lambda rows: rows["alignment_db"]),
        (f"{scheme} SQNR, dB\n(both + {bits:.1f})", lambda r: r["predicted_db"]),
    ]
    figure = Figure(figsize=(1.2 + 1.75 * len(roles), 6.5))
    axes = figure.subplots(len(panels), len(roles), sharex="col", sharey="row", squeeze=False)
    for column, role in enumerate(roles):
        for transform in _main_transforms(frame):
            rows = frame[(frame["role"] == role) & (frame["transform"] == transform)]
            rows = rows.groupby("depth", as_index=False).mean(numeric_only=True)
            color, marker, line = _style(transform)
            for row, (_, values) in enumerate(panels):
                axes[row, column].plot(
                    rows["depth"],
                    values(rows),
                    linestyle=line,
                    color=color,
                    marker=marker,
                    markersize=3,
                    markevery=max(1, len(rows) // 6),
                    label=_label(transform),
                )
        axes[0, column].set_title(role)
        axes[-1, column].set_xlabel("layer")
    for row, (label, _) in enumerate(panels):
        axes[row, 0].set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _main_roles(frame: pd.DataFrame) -> list[str]:
    """Those with the most Linears, in the order of the model, as many as there is room for"""
    common = set(frame["role"].value_counts().index[:8])
    return [role for role in frame["role"].unique() if role in common]


def _joint_concentration(rows: pd.DataFrame) -> list[float]:
    return [
        to_db(parallel_sum(10 ** (w / 10), 10 ** (x / 10)))
        for w, x in zip(
            rows["weight_concentration_db"], rows["activation_concentration_db"], strict=True
        )
    ]


def predicted_against_measured(frame: pd.DataFrame) -> Figure:
    """Figure 2: approximated against measured SQNR, a dot for each Linear"""
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
        for transform in transforms:
            rows = shown[shown["transform"] == transform]
            _dots(
                axis,
                rows["predicted_db"],
                rows["measured_db"],
                _style(transform),
                _label(transform),
            )
        _diagonal(axis, shown["predicted_db"], shown["measured_db"])
        off = (shown["measured_db"] - shown["predicted_db"]).abs()
        # names below the diagonal, where there is room: the outliers are above it
        outliers = shown.loc[off[off > 3].nlargest(3).index].sort_values("measured_db")
        for position, (_, row) in enumerate(outliers.iterrows()):
            axis.annotate(
                _short(row["layer"]),
                (row["predicted_db"], row["measured_db"]),
                xytext=(0.98, 0.03 + 0.07 * position),
                textcoords="axes fraction",
                horizontalalignment="right",
                fontsize=7,
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5},
            )
        axis.set_title(scheme)
        axis.set_xlabel("predicted SQNR, dB")
    figure.axes[0].set_ylabel("measured SQNR, dB")
    figure.axes[0].legend(loc="upper left", fontsize=8)
    return figure


def _short(layer: str) -> str:
    """`model.layers.11.mlp.down_proj` as `11 down_proj`"""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return f"{number[1] + ' ' if number else ''}{layer.rpartition('.')[2]}"


def _dots(axis: Axes, x: pd.Series, y: pd.Series, style: tuple[str, str, str], label: str):
    color, marker, _ = style
    axis.scatter(
        x,
        y,
        s=14,
        marker=marker,
        facecolors="none",
        edgecolors=color,
        linewidths=0.8,
        label=label,
    )


def _diagonal(axis: Axes, x: pd.Series, y: pd.Series):
    values = np.concatenate([x, y])
    values = values[np.isfinite(values)]
    if values.size:
        ends = values.min() - 1, values.max() + 1
        axis.plot(ends, ends, color="grey", linewidth=0.8, zorder=0)


def activations_against_weights(frame: pd.DataFrame) -> Figure:
    """Figure 3: SQNR of quantized activations against that of quantized weights"""
    schemes = [s for s in frame["scheme"].unique() if max(_bits(s)) < 16]
    if not schemes:
        raise MissingData("needs a scheme which quantizes both weights and activations")
    frame = frame[frame["scheme"].isin(schemes)]
    figure = Figure(figsize=(6.2, 5.2))
    axis = figure.subplots()
    for transform in _main_transforms(frame):
        color, _, _ = _style(transform)
        means = []
        for scheme, marker in zip(schemes, itertools.cycle(_MARKERS), strict=False):
            rows = frame[(frame["transform"] == transform) & (frame["scheme"] == scheme)]
            x, y = rows["measured_weights_db"], rows["measured_activations_db"]
            axis.scatter(x, y, s=5, marker=marker, color=color, alpha=0.18, linewidths=0)
            means.append((x.mean(), y.mean(), marker))
        for x, y, marker in means:
            axis.scatter(x, y, s=60, marker=marker, color=color, edgecolors="white", zorder=3)
        axis.annotate(
            _label(transform),
            means[0][:2],
            xytext=(6, -3),
            textcoords="offset points",
            fontsize=7,
            color=color,
        )
        axis.plot([], [], linestyle="none", marker="s", color=color, label=_label(transform))
    for scheme, marker in zip(schemes, itertools.cycle(_MARKERS), strict=False):
        axis.plot([], [], " ", marker=marker, color="grey", label=scheme)
    low, high = axis.get_xlim(), axis.get_ylim()
    x, y = np.meshgrid(np.linspace(*low, 200), np.linspace(*high, 200))
    joint = -10 * np.log10(10 ** (-x / 10) + 10 ** (-y / 10))
    levels = np.arange(math.ceil(joint.min() / 6) * 6, joint.max(), 6)
    lines = axis.contour(x, y, joint, levels, colors="grey", linewidths=0.6, zorder=0)
    axis.clabel(lines, fmt="%d dB", fontsize=7)
    bits = 20 * math.log10((2**8 - 1) / (2**4 - 1))
    start = low[0] + 0.05 * (low[1] - low[0]), high[0] + 0.04 * (high[1] - high[0])
    axis.annotate(
        "", (start[0] + bits, start[1]), start, arrowprops={"arrowstyle": "->", "color": "grey"}
    )
    label = f"8 weight bits and not 4: {bits:.1f} dB"
    axis.annotate(label, start, (0, 4), textcoords="offset points")
    axis.set_xlim(low)
    axis.set_ylim(high)
    axis.set_xlabel("SQNR with quantized weights, dB")
    axis.set_ylabel("SQNR with quantized activations, dB")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="(joint SQNR: grey lines)")
    return figure


def concentrations(frame: pd.DataFrame) -> Figure:
    """Figure 4: concentration of weights and of activations, and that of known data"""
    scheme = next((s for s in frame["scheme"].unique() if max(_bits(s)) < 16), None)
    if scheme is None:
        raise MissingData("needs a scheme which quantizes both weights and activations")
    frame = frame[frame["scheme"] == scheme]
    figure = Figure(figsize=(9, 4.2))
    weight_group, input_group = re.fullmatch(r"W\d+(?:G(\d+))?A\d+(?:G(\d+))?", scheme).groups()
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, column, symmetric, group, what in (
        (left, "weight_concentration_db", True, weight_group, "weights C(W)"),
        (right, "activation_concentration_db", False, input_group, "activations C(x)"),
    ):
        _boxes(axis, frame, column)
        sizes = sorted(frame["in_features"].unique())
        group_size = int(group) if group else None
        for distribution, hatch in (("normal", "///"), ("laplace", "...")):
            levels = [
                to_db(expected_concentration(distribution, int(size), symmetric, group_size))
                for size in (sizes[0], sizes[-1])
            ]
            axis.axhspan(
                min(levels) - 0.04,
                max(levels) + 0.04,
                facecolor="none",
                edgecolor="grey",
                hatch=hatch,
                linewidth=0,
                zorder=0,
                label=f"{distribution.capitalize()} data, d = "
                + " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1]))),
            )
        axis.set_title(what)
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
    axis.set_xticks(
        range(1, len(transforms) + 1),
        [_label(t) for t in transforms],
        rotation=35,
        ha="right",
    )


def alignments(frame: pd.DataFrame) -> Figure:
    """Figure 5: alignment of all Linears, and what is achievable"""
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
    # a rotation has the alignment of what it rotates: only the first of equal lines is drawn
    drawn: dict[str, np.ndarray] = {}
    for transform in frame["transform"].unique():
        values = np.sort(frame.loc[frame["transform"] == transform, "alignment_db"])
        if any(np.allclose(values, other, atol=0.02) for other in drawn.values()):
            continue
        drawn[transform] = values
        color, marker, line = _style(transform)
        axis.plot(
            share,
            values,
            linestyle=line,
            color=color,
            marker=marker,
            markevery=max(1, len(share) // 12),
            markersize=4,
            label=_label(transform),
        )
    axis.set_xlabel("Linears, sorted by alignment, %")
    axis.set_ylabel("alignment A(x, W), dB")
    axis.set_ylim(bottom=floor)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def fewer_bits(frame: pd.DataFrame) -> Figure:
    """Figure 6: fewer bits with CAT against more bits without, for each Linear"""
    schemes = [s for s in frame["scheme"].unique() if len(set(_bits(s))) == 1]
    schemes = sorted((s for s in schemes if max(_bits(s)) < 8), key=_bits)
    if len(schemes) < 2 or not {"none", "cat"} <= set(frame["transform"]):
        raise MissingData("needs the transforms none and cat, and schemes as W4A4 and W6A6")
    few, many = schemes[0], schemes[-1]
    frame = with_roles(frame)
    columns = ["layer", "role", "measured_db"]
    with_cat = frame[(frame["scheme"] == few) & (frame["transform"] == "cat")][columns]
    without = frame[(frame["scheme"] == many) & (frame["transform"] == "none")][columns]
    both = with_cat.merge(without, on=["layer", "role"], suffixes=("_cat", "_none"))
    figure = Figure(figsize=(5.8, 4.4))
    axis = figure.subplots()
    for index, (role, rows) in enumerate(both.groupby("role", sort=False)):
        style = _STYLES[index % len(_STYLES)]
        _dots(axis, rows["measured_db_none"], rows["measured_db_cat"], style, role)
    _diagonal(axis, both["measured_db_none"], both["measured_db_cat"])
    better = (both["measured_db_cat"] > both["measured_db_none"]).mean()
    axis.set_title(f"{few} with CAT is better for {better:.0%} of the Linears", fontsize=9)
    axis.set_xlabel(f"measured SQNR at {many} without a transform, dB")
    axis.set_ylabel(f"measured SQNR at {few} with CAT, dB")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "1-factors": factors,
    "2-predicted-and-measured": predicted_against_measured,
    "3-weights-and-activations": activations_against_weights,
    "4-concentration": concentrations,
    "5-alignment": alignments,
    "6-fewer-bits": fewer_bits,
}

CAPTIONS = {
    "1-factors": "The predicted SQNR of each Linear and its factors. A rotation changes "
    "concentration alone; alignment needs a transform that is no rotation.",
    "2-predicted-and-measured": "Predicted (theorem 2.4) and measured SQNR, a dot for each "
    "Linear. Named are those farthest off the diagonal.",
    "3-weights-and-activations": "Which of the two errors is larger, and what more bits do: "
    "small dots are Linears, large ones their mean.",
    "4-concentration": "How well weights and activations fill their range, over all Linears: "
    "quartiles, and the levels of known distributions.",
    "5-alignment": "Alignment over all Linears, and the region that transforms can reach if "
    "each Linear has its input for itself. Rotations leave it as it is: equal lines "
    "are drawn once.",
    "6-fewer-bits": "Few bits with CAT against more bits without a transform.",
}


def write_figures(
    figures: dict[str, Callable[[pd.DataFrame], Figure]], frame: pd.DataFrame, folder: Path
) -> dict[str, str]:
    """
    Write each figure as PNG and as SVG.

    :return: of figures that cannot be drawn from the table, why not
    """
    missing = {}
    for name, draw in figures.items():
        with mpl.rc_context(_SETTINGS):
            try:
                figure = draw(frame)
            except MissingData as error:
                missing[name] = str(error)
                continue
            figure.savefig(folder / f"{name}.png", dpi=160)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return missing


def checkpoint_layers(frame: pd.DataFrame) -> Figure:
    """SQNR of each quantized Linear of a checkpoint, for itself and accumulated"""
    frame = with_roles(frame)
    roles = _main_roles(frame)
    figure = Figure(figsize=(1.2 + 1.75 * len(roles), 3.2))
    axes = figure.subplots(1, len(roles), sharey=True, squeeze=False)[0]
    for axis, role in zip(axes, roles, strict=True):
        rows = frame[frame["role"] == role]
        for (column, label), (color, _, line) in zip(
            {
                "measured_weights_db": "weights",
                "measured_activations_db": "activations",
                "measured_db": "both",
                "accumulated_db": "both, accumulated",
            }.items(),
            (_STYLES[1], _STYLES[2], _STYLES[0], _STYLES[5]),
            strict=True,
        ):
            values = rows[column].replace(math.inf, math.nan).groupby(rows["depth"]).mean()
            axis.plot(values.index, values, linestyle=line, color=color, label=label)
        axis.set_title(role)
        axis.set_xlabel("layer")
    axes[0].set_ylabel("SQNR of the output, dB")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, title="quantized:")
    return figure


COMPARISON_FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "1-checkpoint": checkpoint_layers,
}

COMPARISON_CAPTIONS = {
    "1-checkpoint": "SQNR of each Linear of the checkpoint: with the input that its original "
    "has, and (accumulated) within the quantized model, after the errors of all before it.",
}
