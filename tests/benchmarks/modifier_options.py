# SPDX-License-Identifier: Apache-2.0
"""
Perplexity of the embedded model at W4A4 RTN for different options of CATModifier, in one run
and on the same texts: what the defaults were chosen by. Takes about 2 minutes an option set
on 2 cores. Runs in the compress environment, after examples/quickstart.sh has unpacked the
model.

    python tests/benchmarks/modifier_options.py output/smollm2-135m-instruct \
        --json tests/benchmarks/results/modifier_options.json
"""

import argparse
import json
import math
import sys
from pathlib import Path

import compressed_tensors
import llmcompressor
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier import CATModifier

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

from tiny_models import int_scheme, make_loader  # noqa: E402

from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows  # noqa: E402

OPTIONS = {
    "no transform": None,
    "Hadamard": {"alignment_strength": 0.0},
    "default": {},
    "block-hadamard": {"rotation": "block-hadamard"},
    "eigen-hadamard": {"rotation": "eigen-hadamard"},
    "blocks of 1": {"transform_block_size": 1},
    "blocks of 64": {"transform_block_size": 64},
    "full blocks": {"transform_block_size": "full"},
    "tensor parallel 2": {"tensor_parallel_size": 2},
    "tensor parallel 4": {"tensor_parallel_size": 4},
    "tensor parallel 8": {"tensor_parallel_size": 8},
    "dampening_frac 0.0001": {"dampening_frac": 1e-4},
    "dampening_frac 0.1": {"dampening_frac": 0.1},
    "alignment_strength 0.75": {"alignment_strength": 0.75},
    "bfloat16 transforms": {"precision": "bfloat16"},
    "float32 transforms": {"precision": "float32"},
}


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    total = 0.0
    for batch in ids.split(4):
        logits = model(batch).logits[:, :-1].float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(
            logits, batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / ids[:, 1:].numel())


def main():
    parser = argparse.ArgumentParser(description="Options of CATModifier on a real model")
    parser.add_argument("model")
    parser.add_argument("--only", nargs="*", choices=OPTIONS, help="some of the option sets")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = windows(load_texts(EMBEDDED, "train"), tokenizer, 512, args.samples)
    held_out = windows(load_texts(EMBEDDED, "test"), tokenizer, 512, 48)
    scheme = int_scheme(4, 4)
    scheme["config_groups"]["group_0"]["weights"]["observer"] = "memoryless_mse"

    rows = {"bf16": perplexity(AutoModelForCausalLM.from_pretrained(args.model), held_out)}
    for name in args.only or OPTIONS:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        recipe = [QuantizationModifier(**scheme)]
        if OPTIONS[name] is not None:
            recipe.insert(0, CATModifier(**OPTIONS[name]))
        loader = make_loader(calibration)
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=loader)
        rows[name] = perplexity(model, held_out)
        if args.json:
            packages = (torch, transformers, compressed_tensors, llmcompressor, cat_modifier)
            result = {
                "calibration_tokens": calibration.numel(),
                "held_out_tokens": held_out.numel(),
                "versions": {package.__name__: package.__version__ for package in packages},
                "perplexity": rows,
            }
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    table = Table("options", "perplexity")
    for name, value in rows.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
