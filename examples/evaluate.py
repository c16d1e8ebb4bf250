# SPDX-License-Identifier: Apache-2.0
"""
Perplexity of checkpoints on held-out text, loaded with Transformers, and their size.

    python examples/evaluate.py bf16=MODEL "W4A4 CAT=output/my-model-w4a4" --json table.json
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows


@torch.no_grad()
def perplexity(path: str, ids: Tensor, description: str) -> float:
    """
    Compute the perplexity of a checkpoint.

    :param path: folder or Hub id
    :param ids: token ids, shape (windows, length); the first token of a window is not scored
    :param description: label of the progress bar
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    total = 0.0
    for batch in track(ids.split(4), description, transient=True):
        logits = model(batch).logits[:, :-1].float()
        labels = batch[:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        ).item()
    return math.exp(total / ids[:, 1:].numel())


def size(path: str) -> int:
    """Count the bytes of a checkpoint's weights; 0 if the path is not a folder."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=PATH")
    parser.add_argument(
        "--dataset", default=EMBEDDED, help="id on the Hub, or id:configuration"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--column", default="text", help="column that holds the text")
    parser.add_argument("--samples", type=int, default=48, help="windows to evaluate on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()

    models = dict(model.split("=", 1) for model in args.models)
    tokenizer = AutoTokenizer.from_pretrained(next(iter(models.values())))
    texts = load_texts(args.dataset, args.split, args.column)
    ids = windows(texts, tokenizer, args.length, args.samples)

    rows = {
        name: {"perplexity": perplexity(path, ids, name), "bytes": size(path)}
        for name, path in models.items()
    }
    table = Table(title=f"{ids.numel()} held-out tokens")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("MB", justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row['perplexity']:.2f}", f"{row['bytes'] / 1e6:.0f}")
    Console().print(table)

    if args.json:
        versions = {
            package.__name__: package.__version__
            for package in (torch, transformers, cat_modifier)
        }
        result = {"tokens": ids.numel(), "versions": versions, "models": rows}
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
