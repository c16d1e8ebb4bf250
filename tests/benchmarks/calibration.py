# SPDX-License-Identifier: Apache-2.0
"""
Calibration: time and peak memory of CATModifier, of GPTQModifier and of a plain forward
pass, over the same samples. Each runs in a process of its own, round after round. Runs in
the compress environment, after examples/quickstart.sh has unpacked the model.

    python tests/benchmarks/calibration.py output/smollm2-135m-instruct \
        --json tests/benchmarks/results/calibration.json
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SIDES = ("forward pass", "CATModifier", "GPTQModifier")


def run(side: str, path: str, samples: int, length: int) -> dict:
    """In a process of its own"""
    import llmcompressor
    import torch
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import int_scheme, make_loader

    from cat_modifier import CATModifier
    from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    loader = make_loader(windows(load_texts(EMBEDDED, "train"), tokenizer, length, samples))

    def forward():
        with torch.no_grad():
            for batch in loader:
                model(**batch, use_cache=False)

    times = {}

    class TimedModifier(CATModifier):
        """Notes when the pass over the data begins and ends"""

        def on_calibration_start(self, state, event, **kwargs):
            super().on_calibration_start(state, event, **kwargs)
            times["begin"] = time.perf_counter()

        def on_sequential_epoch_end(self, state, event, modules, **kwargs):
            times.setdefault("end", time.perf_counter())
            super().on_sequential_epoch_end(state, event, modules, **kwargs)

    recipe = TimedModifier() if side == "CATModifier" else GPTQModifier(**int_scheme(4, None))
    start = time.perf_counter()
    if side == "forward pass":
        forward()
    else:
        oneshot(model=model, recipe=recipe, dataset=loader)
    seconds = time.perf_counter() - start
    memory = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    modules = (torch, transformers, llmcompressor)
    return {
        "seconds": seconds,
        "seconds of the pass over the data": times["end"] - times["begin"] if times else 0.0,
        "peak memory, MB": int(memory[1]) / 1024,
        "versions": {module.__name__: module.__version__ for module in modules},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("\nresult", json.dumps(run(args.side, args.model, args.samples, args.length)))
        return

    results = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES:
            print(f"Round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
            process = subprocess.run(
                [sys.executable, __file__, args.model, "--side", side]
                + ["--samples", str(args.samples), "--length", str(args.length)],
                capture_output=True,
                text=True,
            )
            lines = [line for line in process.stdout.splitlines() if line.startswith("result")]
            if not lines:
                raise SystemExit(process.stderr)
            results[side].append(json.loads(lines[0].removeprefix("result")))

    def ratio(side: str, key: str) -> float:
        pairs = zip(results[side], results[SIDES[0]], strict=True)
        return median(one[key] / base["seconds"] for one, base in pairs)

    key = "peak memory, MB"
    plain = median(result[key] for result in results[SIDES[0]])
    summary = {
        side: {
            "seconds": median(result["seconds"] for result in rounds),
            "time to forward pass": ratio(side, "seconds"),
            "time of the pass over the data to forward pass": ratio(
                side, "seconds of the pass over the data"
            ),
            "peak memory beyond forward pass, MB": median(r[key] for r in rounds) - plain,
        }
        for side, rounds in results.items()
    }
    for side, values in summary.items():
        print(f"{side:14}", ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
    if args.json:
        result = {
            "tokens": args.samples * args.length,
            "versions": results[SIDES[0]][0]["versions"],
            "medians": summary,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
