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
    "Hadamard": "W4A4 Hadamard RTN",
    "CAT": "W4A4 CAT RTN",
    "CAT, GPTQ": "W4A4 CAT, alignment_strength 0.75 GPTQ, dampening 0.1",
}
"""Rows of the results by their label"""

MODELS = ("SmolLM2-135M-Instruct", "its rotated twin, which is harder")
TEXT = "news"

# greys and colours of enough contrast on white and on near-black; Okabe-Ito blue for CAT
INK, OTHERS, CAT = "#747c86", "#9a9fa6", "#2f8fd0"


def perplexity(row: dict) -> float:
    """Mean over seeds and windows"""
    losses = [loss for one in row.values() for loss in one[TEXT]["loss"]]
    return math.exp(sum(losses) / len(losses))


def draw(axes: Axes, rows: dict[str, dict], title: str):
    """
    Draw one bar per recipe, from the perplexity of bf16 to that of the quantized model.

    :param rows: results of a model by name, each by seed
    """
    reference = perplexity(rows["bf16"])
    loss = math.log(perplexity(rows[BARS["Hadamard"]]) / reference)
    for position, (label, name) in enumerate(BARS.items()):
        value = perplexity(rows[name])
        colour = CAT if label.startswith("CAT") else OTHERS
        axes.barh(position, value - reference, left=reference, height=0.64, color=colour)
        returned = 1 - math.log(value / reference) / loss
        axes.annotate(
            f"{value:.1f}" + (f"   {returned:.0%} back" if returned > 0 else ""),
            (value, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            weight="bold" if colour == CAT else "normal",
        )
    axes.axvline(reference, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(reference, reference * math.exp(1.2 * loss))  # room for labels
    axes.set_yticks(range(len(BARS)), list(BARS))
    axes.set_title(
        f"{title} (bf16: {reference:.1f})",
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

    models = json.loads(args.results.read_text())["models"]
    # the same file each time
    plt.rcParams.update({"svg.hashsalt": "accuracy", "font.size": 10.5})
    figure, columns = plt.subplots(1, 2, figsize=(9.6, 2.0), sharey=True, layout="constrained")
    for axes, rows, title in zip(columns, models.values(), MODELS, strict=True):
        draw(axes, rows, title)
    columns[0].invert_yaxis()  # both share it
    columns[1].tick_params(axis="y", labelleft=False)
    figure.suptitle(
        "Perplexity on news at W4A4 (log scale), and how much of Hadamard's loss comes back",
        color=INK,
        fontsize=11.5,
        x=0.01,
        ha="left",
        weight="bold",
    )
    figure.savefig(args.output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
