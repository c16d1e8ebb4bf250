# SPDX-License-Identifier: Apache-2.0
"""
Perplexity by the position of a token in a long context, of quantized models and of their
original, and the KL divergence from it. Windows of held-out texts of several kinds. Runs in the
compress environment; some 5 minutes for a window of 8,192 tokens and three models of 135M
parameters on 2 cores.

    python tests/benchmarks/long_context.py output/smollm2-135m-instruct output/w4a4_hadamard \
        output/w4a4 --json tests/benchmarks/results/long_context.json
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import compressed_tensors
import torch
import transformers
from held_out_texts import TEXTS, read_held_out_texts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier.calibration.texts import windows

STEP = 256
"""Tokens whose probabilities are computed at once"""


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@torch.no_grad()
def measure(models: dict[str, torch.nn.Module], window: Tensor) -> dict[str, dict]:
    """
    Compare models on a window.

    :param models: the original first
    :param window: ids, shape (length,)
    :return: by model, "loss" and "KL divergence" of each predicted token, in nats
    """
    result: dict[str, dict] = {name: {"loss": [], "KL divergence": []} for name in models}
    hidden = {
        name: model.model(window[None]).last_hidden_state[0, :-1]
        for name, model in models.items()
    }
    for start in range(0, len(window) - 1, STEP):
        expected = None
        for name, model in models.items():
            logits = model.lm_head(hidden[name][start : start + STEP])
            found = logits.float().log_softmax(-1)
            expected = found if expected is None else expected
            target = window[start + 1 : start + 1 + len(found), None]
            divergence = (expected.exp() * (expected - found)).sum(-1)
            result[name]["loss"] += (-found.gather(-1, target)[:, 0]).tolist()
            result[name]["KL divergence"] += divergence.tolist()
    return result


def ends(length: int) -> list[int]:
    """Where groups of positions end: at powers of two from 256 on"""
    return [2**i for i in range(8, 32) if 2**i < length] + [length]


def by_position(values: list[float], length: int) -> list[float]:
    """Means over groups of positions"""
    starts = [0, *ends(length)]
    groups = (values[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True))
    return [sum(group) / len(group) for group in groups]


def show(result: dict):
    starts = [0, *ends(result["tokens of a window"])]
    positions = (f"{a}-{b - 1}" for a, b in zip(starts[:-1], starts[1:], strict=True))
    table = Table("model", "text", "", *positions)
    for name, windows_of in result["models"].items():
        for text in dict.fromkeys(result["texts"]):
            own = [
                one for one, of in zip(windows_of, result["texts"], strict=True) if of == text
            ]
            means = {
                what: [fmean(x) for x in zip(*(o[what] for o in own), strict=True)]
                for what in own[0]
            }
            table.add_row(
                name, text, "perplexity", *(f"{math.exp(x):.2f}" for x in means["loss"])
            )
            table.add_row("", "", "KL", *(f"{x:.3f}" for x in means["KL divergence"]))
    Console(width=160).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("quantized", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=1, help="windows of each kind of text")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.original)
    texts = read_held_out_texts()
    models = {str(path): load(path) for path in (args.original, *args.quantized)}
    packages = (torch, transformers, compressed_tensors, cat_modifier)
    result = {
        "tokens of a window": args.length,
        "texts": [],
        "versions": {package.__name__: package.__version__ for package in packages},
        "models": {name: [] for name in models},
    }
    for text in TEXTS:
        for window in windows(texts[text], tokenizer, args.length, args.samples):
            result["texts"].append(text)
            for name, values in measure(models, window).items():
                means = {what: by_position(one, args.length) for what, one in values.items()}
                result["models"][name].append(means)
            print(f"{text}: {len(result['texts'])} windows", flush=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
