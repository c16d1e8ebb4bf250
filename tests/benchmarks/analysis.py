# SPDX-License-Identifier: Apache-2.0
"""
What the SQNR analysis of the embedded model costs, and how well it predicts. In one run:
a forward pass over the tokens, the calibration pass of llm-compressor with CATModifier over
the same tokens, and the analysis (without its plots); then the difference of measured and
predicted SQNR over all Linears. Takes about 15 minutes on 2 cores. Runs in the compress
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
from cat_modifier.analysis.layers import without_predictions
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_loader  # noqa: E402


@torch.no_grad()
def forward_pass(model: PreTrainedModel, ids: Tensor):
    for batch in ids.split(max(1, 2048 // ids.shape[1])):
        model(batch, use_cache=False)


def calibration_pass(model: PreTrainedModel, ids: Tensor):
    """CATModifier in llm-compressor, and nothing else"""
    oneshot(model=model, recipe=CATModifier(), dataset=make_loader(ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of all sides, in turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_texts(EMBEDDED, "train")
    ids = windows(texts, tokenizer, args.length, args.samples)
    forward_pass(model, ids[:4])  # to warm up

    batches = [
        without_predictions(model, batch) for batch in ids.split(max(1, 2048 // args.length))
    ]
    forward, calibration = "forward pass", "calibration pass, CATModifier"
    sides = {
        forward: lambda model: forward_pass(model, ids),
        calibration: lambda model: calibration_pass(model, ids),
        "analysis": lambda model: analyze(model, batches),
        "analysis with cat-full": lambda model: analyze(
            model, batches, transforms=list(TRANSFORMS)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        # in turn: the speed of the machine drifts
        for name, run in sides.items():
            # CATModifier changes it
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
            start = time.perf_counter()
            frame = run(model)
            seconds[name].append(time.perf_counter() - start)

    costs = Table("", "s", "x forward", "x calibration", title=f"{ids.numel()} tokens")
    ratios = {}
    for name, values in seconds.items():
        ratios[name] = [
            median(value / other for value, other in zip(values, seconds[base], strict=True))
            for base in (forward, calibration)
        ]
        costs.add_row(name, f"{median(values):.0f}", *(f"{r:.2f}" for r in ratios[name]))

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
            "ratios_to_forward_and_calibration": ratios,
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
