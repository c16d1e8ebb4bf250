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
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows
from cat_modifier.model_path import check_model


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
    for batch in tqdm(ids.split(4), description, leave=False):
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
    parser = argparse.ArgumentParser(
        description=__doc__.strip().partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="folder, or id on the Hugging Face Hub; with a name for the table",
    )
    parser.add_argument(
        "--dataset",
        default=EMBEDDED,
        help="id on the Hub (or id:configuration); a .txt, .md, .json, .jsonl, .csv or "
        ".parquet file; pydoc-topics, the documentation of Python; or python-mixed, text of "
        "four kinds of the Python installation",
    )
    parser.add_argument(
        "--split",
        default="test",
        help="split of a dataset on the Hub; of the last two, train and test are one half each",
    )
    parser.add_argument("--column", default="text", help="column that holds the text")
    parser.add_argument("--samples", type=int, default=48, help="windows to evaluate on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()

    models = {}
    for model in args.models:
        name, _, path = model.partition("=")
        models[name] = path or name
    try:
        for path in models.values():
            check_model(path)
    except OSError as error:
        parser.error(str(error))
    tokenizer = AutoTokenizer.from_pretrained(next(iter(models.values())))
    texts = load_texts(args.dataset, args.split, args.column)
    ids = windows(texts, tokenizer, args.length, args.samples)

    # each row takes minutes: print it when it is known
    rows = {}
    title = f"{ids.numel():,} held-out tokens"
    width = max(map(len, [*models, title]))
    print(f"| {title:<{width}} | perplexity |     MB |")
    print(f"| {'':-<{width}} | ---------: | -----: |", flush=True)
    for name, path in models.items():
        row = rows[name] = {"perplexity": perplexity(path, ids, name), "bytes": size(path)}
        numbers = f"{row['perplexity']:10.2f} | {row['bytes'] / 1e6:6.0f}"
        print(f"| {name:<{width}} | {numbers} |", flush=True)

    if args.json:
        versions = {
            package.__name__: package.__version__
            for package in (torch, transformers, cat_modifier)
        }
        result = {"tokens": ids.numel(), "versions": versions, "models": rows}
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
