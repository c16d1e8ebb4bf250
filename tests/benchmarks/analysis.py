# SPDX-License-Identifier: Apache-2.0
"""
What the SQNR analysis of the embedded model costs, and how well it predicts. In one run:
a forward pass over the tokens, the calibration pass of llm-compressor with CATModifier over
the same tokens, and the analysis (without its plots); then the difference of measured and
predicted SQNR over all Linears. Takes about 8 minutes on 2 cores. Runs in the compress
environment, after examples/quickstart.sh has unpacked the model.

    python tests/benchmarks/analysis.py output/smollm2-135m-instruct \
        --json tests/benchmarks/results/analysis.json
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import llmcompressor
import torch
import transformers
from llmcompressor import oneshot
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import cat_modifier
from cat_modifier import CATModifier
from cat_modifier.analysis import TRANSFORMS, analyze
from cat_modifier.analysis.layers import DEFAULT_TRANSFORMS
from cat_modifier.analysis.passes import without_predictions
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_loader  # noqa: E402


@torch.no_grad()
def forward_pass(model: PreTrainedModel, ids: Tensor) -> float:
    """Seconds"""
    start = time.perf_counter()
    for batch in ids.split(max(1, 2048 // ids.shape[1])):
        model(batch, use_cache=False)
    return time.perf_counter() - start


def calibration_pass(path: str, ids: Tensor) -> float:
    """Seconds of CATModifier in llm-compressor, and of nothing else"""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    loader = make_loader(ids)
    start = time.perf_counter()
    oneshot(model=model, recipe=CATModifier(), dataset=loader)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--repeat", type=int, default=1, help="times to pass the same text, for timing"
    )
    parser.add_argument("--skip-cat-full", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_texts(EMBEDDED, "train")
    ids = windows(texts, tokenizer, args.length, args.samples).repeat(args.repeat, 1)
    forward_pass(model, ids[:4])  # to warm up

    seconds = {"forward pass": [], "analysis": {}}
    batches = [
        without_predictions(model, batch) for batch in ids.split(max(1, 2048 // args.length))
    ]
    sides = {"default": list(DEFAULT_TRANSFORMS), "with cat-full": list(TRANSFORMS)}
    if args.skip_cat_full:
        del sides["with cat-full"]
    for name, transforms in sides.items():
        # before and after: the speed of the machine drifts
        seconds["forward pass"].append(forward_pass(model, ids))
        start = time.perf_counter()
        frame = analyze(model, batches, transforms=transforms)
        seconds["analysis"][name] = time.perf_counter() - start
    seconds["forward pass"].append(forward_pass(model, ids))
    seconds["calibration pass"] = calibration_pass(args.model, ids)
    seconds["forward pass"].append(forward_pass(model, ids))

    forward = median(seconds["forward pass"])
    costs = Table("", "s", "x forward", "x calibration", title=f"{ids.numel()} tokens")
    for name, value in {
        "forward pass": forward,
        "calibration pass, CATModifier": seconds["calibration pass"],
        **{f"analysis, {name}": value for name, value in seconds["analysis"].items()},
    }.items():
        ratios = value / forward, value / seconds["calibration pass"]
        costs.add_row(name, f"{value:.0f}", *(f"{ratio:.2f}" for ratio in ratios))

    frame["error"] = frame["measured_db"] - frame["predicted_db"]
    errors = frame.groupby(["transform", "scheme"], sort=False)["error"].describe(
        percentiles=[0.05, 0.1, 0.5, 0.9, 0.95]
    )
    columns = ["min", "5%", "10%", "50%", "90%", "95%", "max"]
    title = "measured minus predicted SQNR, dB"
    distribution = Table("transform", "scheme", *columns, title=title)
    for key, row in errors.iterrows():
        distribution.add_row(*key, *(f"{row[column]:.2f}" for column in columns))
    Console().print(costs, distribution)

    if args.json:
        modules = (torch, transformers, llmcompressor, cat_modifier)
        result = {
            "tokens": ids.numel(),
            "versions": {module.__name__: module.__version__ for module in modules},
            "seconds": seconds,
            "measured_minus_predicted_db": errors.round(3).reset_index().to_dict("records"),
            "mean_measured_db": frame.pivot_table(
                index="transform", columns="scheme", values="measured_db", sort=False
            )
            .round(2)
            .to_dict("index"),
        }
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
