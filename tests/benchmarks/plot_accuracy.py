# SPDX-License-Identifier: Apache-2.0
"""
Draw how much of the loss of W4A4 comes back, from the JSON of accuracy.py. Runs in the
compress environment.

    python tests/benchmarks/plot_accuracy.py tests/benchmarks/results/accuracy.json \
        tests/benchmarks/results/accuracy.svg
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROWS = {
    "W4A4 Hadamard RTN": "Hadamard",
    "W4A4 Hadamard GPTQ, dampening 0.1": "Hadamard, GPTQ",
    "W4A4 CAT RTN": "CAT",
    "W4A4 CAT, strength 0.75 GPTQ, dampening 0.1": "CAT, GPTQ",
    "W4A4 CAT, trained RTN": "CAT, trained",
}
TEXTS = {"documentation": "#2a7fb8", "news": "#e08214"}
GREY = "#808080"  # readable on white and on dark pages


def lost(rows: dict, name: str, text: str) -> float:
    """Compute the log-perplexity lost to bf16, percent of what Hadamard by rounding loses"""

    def loss(row: str) -> float:
        return math.log(rows[row][text]["perplexity"] / rows["bf16"][text]["perplexity"])

    return 100 * loss(name) / loss(next(iter(ROWS)))


def draw(rows: dict, path: Path):
    figure, axes = plt.subplots(figsize=(7, 2.8))
    height = 0.38
    for index, (text, colour) in enumerate(TEXTS.items()):
        for position, name in enumerate(reversed(ROWS)):
            value = lost(rows, name, text)
            y = position + (0.5 - index) * height
            axes.barh(y, value, height, color=colour, label=text if position == 0 else None)
            perplexity = rows[name][text]["perplexity"]
            axes.text(value + 1, y, f"{perplexity:.1f}", va="center", color=GREY, fontsize=8)
    axes.set_yticks(range(len(ROWS)), list(reversed(ROWS.values())), color=GREY)
    axes.set_xlabel("log-perplexity lost to bf16, % of Hadamard's loss", color=GREY)
    axes.set_xlim(0, 112)
    axes.tick_params(colors=GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, loc="lower right", fontsize=9)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "accuracy"  # the same file each time
    figure.savefig(
        path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path, help=".svg or .png")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text())["rows"], args.picture)
