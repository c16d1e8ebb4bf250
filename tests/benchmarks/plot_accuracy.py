# SPDX-License-Identifier: Apache-2.0
"""
Draw the README's picture from the results of accuracy.py: perplexity of W4A4 models, and how
much of the loss with Hadamard alone comes back. Runs in the compress environment in seconds.

    python tests/benchmarks/plot_accuracy.py tests/benchmarks/results/accuracy.json \
        --output tests/benchmarks/results/accuracy.svg
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

BARS = {
    "no transform": "W4A4 no transform RTN",
    "Hadamard": "W4A4 Hadamard RTN",
    "Hadamard, GPTQ": "W4A4 Hadamard GPTQ, dampening 0.1",
    "CAT": "W4A4 CAT RTN",
    "CAT, GPTQ": "W4A4 CAT, alignment_strength 0.75 GPTQ, dampening 0.1",
    "CAT, trained": "W4A4 CAT, trained RTN",
}
"""Rows of the results by their label"""

TEXTS = {"documentation": "text like the calibration's", "news": "text of another kind"}

# greys and colours of enough contrast on white and on near-black; Okabe-Ito blue for CAT
INK, OTHERS, CAT = "#747c86", "#9a9fa6", "#2f8fd0"


def draw(axes: Axes, rows: dict[str, dict], text: str):
    """
    Draw one bar per model, from the perplexity of bf16 to that of the model.

    :param rows: results by name, each by text
    :param text: key of ``TEXTS``
    """
    reference = rows["bf16"][text]["perplexity"]
    loss = math.log(rows[BARS["Hadamard"]][text]["perplexity"] / reference)
    # without a transform the loss is several times that with Hadamard: its bar is cut off
    end = reference * math.exp(1.45 * loss)
    for position, (label, name) in enumerate(BARS.items()):
        perplexity = rows[name][text]["perplexity"]
        colour = CAT if label.startswith("CAT") else OTHERS
        length = min(perplexity, end) - reference
        axes.barh(position, length, left=reference, height=0.64, color=colour)
        returned = 1 - math.log(perplexity / reference) / loss
        shown = f"{perplexity:.1f}"
        if returned > 0:
            shown += f"   {returned:.0%} back"
        is_cut = perplexity > end
        axes.annotate(
            f"{perplexity:.0f}, off the scale \N{RIGHTWARDS ARROW}" if is_cut else shown,
            (min(perplexity, end), position),
            xytext=(-5 if is_cut else 5, 0),
            textcoords="offset points",
            ha="right" if is_cut else "left",
            va="center",
            color="black" if is_cut else INK,
            weight="bold" if colour == CAT else "normal",
        )
    axes.axvline(reference, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(reference, end)
    axes.set_yticks(range(len(BARS)), list(BARS))
    axes.set_title(
        f"{TEXTS[text]} (bf16: {reference:.1f})",
        color=INK,
        fontsize=11,
        loc="left",
    )
    axes.minorticks_off()
    axes.set_xticks([])
    axes.tick_params(axis="y", colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    rows = json.loads(args.results.read_text())["rows"]
    # the same file each time
    plt.rcParams.update({"svg.hashsalt": "accuracy", "font.size": 10.5})
    figure, columns = plt.subplots(1, 2, figsize=(9.6, 2.7), sharey=True, layout="constrained")
    for axes, text in zip(columns, TEXTS, strict=True):
        draw(axes, rows, text)
    columns[0].invert_yaxis()  # both share it
    columns[1].tick_params(axis="y", labelleft=False)
    figure.suptitle(
        "Perplexity at W4A4 (log scale from bf16), and how much of Hadamard's loss comes back",
        color=INK,
        fontsize=11.5,
        x=0.01,
        ha="left",
        weight="bold",
    )
    figure.savefig(args.output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
