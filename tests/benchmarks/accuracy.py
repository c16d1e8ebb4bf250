# SPDX-License-Identifier: Apache-2.0
"""
Accuracy of models, quantized in many ways: each with llm-compressor from the same calibration
text, in an order that depends on a seed, exported, loaded with Transformers, and
compared with the bfloat16 model on four kinds of held-out text. Takes 3 to 6 minutes a row,
model and seed on 2 cores, 40 or more if transforms are trained; rows which the JSON has are
not made again. Runs in the compress environment, after examples/quickstart.sh has
unpacked the model, and make_twin.py has rotated it.

    python tests/benchmarks/accuracy.py output/smollm2-135m-instruct output/twin \
        --json tests/benchmarks/results/accuracy.json

makes rows of the README, with the recipes of this repository. `--seeds 0 1 2` makes those of
three seeds, `--rows` names others: "CAT, trained RTN" is that of trained transforms.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import compressed_tensors
import llmcompressor
import torch
import transformers
import yaml
from compressed_tensors.quantization.utils import is_module_quantized
from held_out_texts import TEXTS, read_held_out_texts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier.analysis.allocation import config_group
from cat_modifier.calibration.texts import EMBEDDED, MIXED, load_texts, windows

ROOT = Path(__file__).parents[2]
IGNORE = ["re:.*lm_head"]


def transforms_of(recipe: str) -> dict:
    """Modifiers of a recipe of this repository, without the last, which quantizes"""
    content = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    modifiers = content["quant_stage"]["quant_modifiers"]
    return dict(list(modifiers.items())[:-1])


TRANSFORMS = {
    "no transform": {},
    "SmoothQuant": {"SmoothQuantModifier": {}},
    # those of its rotations that are fused: Transformers does not apply the others
    "SpinQuant R1 R2": {
        "SpinQuantModifier": {"rotations": ["R1", "R2"], "transform_block_size": 64}
    },
    "Hadamard": transforms_of("w4a4_hadamard"),
    "Hadamard, clipped": {"CATModifier": {"alignment_strength": 0.0}},
    "CAT, paper": {"CATModifier": {"fuse_attention": False, "clip_activations": False}},
    "CAT": transforms_of("w4a4"),
    "CAT, alignment_strength 0.75": transforms_of("w4a4_gptq"),
    "CAT, trained": transforms_of("w4a4_trained"),
    "CAT, trained by layers": {**transforms_of("w4a4"), "CATTrainingModifier": {}},
    "CAT, block Hadamard": {"CATModifier": {"rotation": "block-hadamard"}},
    "CAT, block Hadamard, alignment_strength 0.75": transforms_of("nvfp4"),
    "CAT, block Hadamard, alignment_strength 0.75, trained by layers": {
        **transforms_of("nvfp4"),
        "CATTrainingModifier": {"steps": 40, "learning_rate": 0.001},
    },
    "CAT, block Hadamard, blocks of 64": {
        "CATModifier": {"transform_block_size": 64, "rotation": "block-hadamard"}
    },
    "CAT, max_overhead 0.075": {"CATModifier": {"max_overhead": 0.075}},
    "CAT, blocks to 512, max_overhead 0.102": {
        "CATModifier": {"transform_block_size": 512, "max_overhead": 0.102}
    },
    "CAT, scaling alone": {"CATModifier": {"transform_block_size": 1, "rotation": "none"}},
}
"""Modifiers before the one that quantizes"""

ROUNDING = {
    "RTN": ("QuantizationModifier", {}),
    "GPTQ": ("GPTQModifier", {}),
    "GPTQ, dampening 0.1": ("GPTQModifier", {"dampening_frac": 0.1}),
}
"""The modifier that quantizes, and its options"""

ROWS = ["Hadamard RTN", "CAT RTN", "CAT, alignment_strength 0.75 GPTQ, dampening 0.1"]


def quantization(scheme: str) -> dict:
    """Of a modifier of llm-compressor"""
    if scheme in ("NVFP4", "MXFP4"):
        return {"ignore": IGNORE, "targets": ["Linear"], "scheme": scheme}
    return {"ignore": IGNORE, "config_groups": {"group_0": config_group(scheme, ["Linear"])}}


def make_recipe(scheme: str, row: str) -> str:
    """
    :param row: a key of TRANSFORMS and one of ROUNDING, with a space between
    """
    transform, rounding = next(
        (row.removesuffix(f" {one}"), one) for one in ROUNDING if row.endswith(f" {one}")
    )
    modifier, options = ROUNDING[rounding]
    modifiers = {**TRANSFORMS[transform], modifier: options | quantization(scheme)}
    return yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}}, sort_keys=False)


def make_checkpoint(model: str, folder: Path, content: str, calibration: str, seed: int):
    """
    Quantize a model in a process of its own, as users do.

    :param content: the recipe
    :param calibration: name of the calibration text
    :param seed: order of the calibration texts, and with it the windows that are taken
    """
    recipe, texts = folder / "recipe.yaml", folder / "texts.jsonl"
    recipe.write_text(content)
    rows = [json.dumps({"text": text}) for text in load_texts(calibration, "train")]
    random.Random(seed).shuffle(rows)
    texts.write_text("\n".join(rows))
    command = [sys.executable, "-m", "cat_modifier.cli", "quantize", model]
    command += ["--recipe", str(recipe), "--output", str(folder / "checkpoint")]
    command += ["--dataset", str(texts)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def load(path: str | Path):
    """Load a model, to a GPU if there is one"""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return model.to("cuda") if torch.cuda.is_available() else model


@torch.no_grad()
def log_probabilities(model, window: Tensor) -> Tensor:
    """Of the tokens after each, shape (length - 1, vocabulary), float32"""
    return model(window[None].to(model.device)).logits[0, :-1].float().log_softmax(-1)


def evaluate(model, ids: Tensor, reference: list[Tensor]) -> dict[str, list[float]]:
    """
    Compute means over the tokens of each window.

    :param ids: shape (windows, length)
    :param reference: log-probabilities of the original for each window, float16
    """
    result: dict[str, list[float]] = {"loss": [], "KL divergence": [], "top-1 agreement": []}
    for window, expected in zip(ids, reference, strict=True):
        found, expected = log_probabilities(model, window), expected.float()
        loss = -found.gather(-1, window[1:, None].to(found.device)).mean()
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean()
        values = (loss, divergence, agreement)
        for name, value in zip(result, values, strict=True):
            result[name].append(value.item())
    return result


def closed(row: Tensor, best: Tensor, hadamard: Tensor) -> Tensor:
    """
    Share of the gap in log-perplexity between bf16 and Hadamard by rounding that a row closes.

    :param row: loss by window, shape (..., windows)
    :param best: that of bf16
    :param hadamard: that of Hadamard
    """
    return 1 - (row - best).mean(-1) / (hadamard - best).mean(-1)


def error_of(values: Tensor) -> float:
    """Standard error of a mean, shape (values); 0 of a single value"""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def closed_with_error(row: Tensor, best: Tensor, hadamard: Tensor) -> tuple[float, float]:
    """
    See :func:`closed`. The error is that of the windows by the jackknife, and of the seeds.

    :param row: loss by seed and window, shape (seeds, windows)
    :param best: loss by window, shape (windows,)
    :param hadamard: shape (seeds, windows)
    """
    row, seeds = row.mean(0), closed(row, best, hadamard.mean(0))
    hadamard, count = hadamard.mean(0), len(best)
    others = [[i for i in range(count) if i != left] for left in range(count)]
    without = torch.stack([closed(row[one], best[one], hadamard[one]) for one in others])
    by_window = math.sqrt(count - 1) * without.std(correction=0).item()
    return closed(row, best, hadamard).item(), math.hypot(by_window, error_of(seeds))


def stacked(row: dict, text: str, what: str) -> Tensor:
    """Values of a row by seed and window, shape (seeds, windows)"""
    return torch.tensor([one[text][what] for one in row.values()], dtype=torch.float64)


def show(model: str, rows: dict):
    """
    Print the table of a model.

    :param rows: by name, then seed, text, kind of value; values by window
    """
    table = Table(
        model, *(f"{text}: {what}" for text in TEXTS for what in ("ppl", "KL", "gap"))
    )
    for name, row in rows.items():
        hadamard = rows.get(f"{name.partition(' ')[0]} Hadamard RTN")
        cells = []
        for text in TEXTS:
            loss, divergence = (stacked(row, text, one) for one in ("loss", "KL divergence"))
            cells.append(f"{loss.mean().exp().item():.2f}")
            error = math.hypot(error_of(divergence.mean(0)), error_of(divergence.mean(1)))
            cells.append(f"{divergence.mean().item():.3f} +- {error:.3f}")
            if hadamard is None:
                cells.append("")
                continue
            best = stacked(rows["bf16"], text, "loss")[0]
            share, error = closed_with_error(loss, best, stacked(hadamard, text, "loss"))
            cells.append(f"{share:.0%} +- {error:.0%}")
        table.add_row(name, *cells)
    Console(width=220).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--schemes", nargs="+", default=["W4A4"])
    choices = [f"{transform} {rounding}" for transform in TRANSFORMS for rounding in ROUNDING]
    parser.add_argument(
        "--rows",
        nargs="+",
        default=ROWS,
        choices=choices,
        metavar="TRANSFORM ROUNDING",
        help="rows of each scheme; default: those of the README",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        type=lambda text: text.split("=", 1),
        help="more rows, as `4.5-bit CAT RTN=mixed.yaml`",
    )
    parser.add_argument("--calibration", choices=(EMBEDDED, MIXED), default=MIXED)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=16, help="windows of each text")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    packages = (torch, transformers, compressed_tensors, llmcompressor, cat_modifier)
    result = {
        "tokens of each text": args.samples * 512,
        "calibration": args.calibration,
        "versions": {package.__name__: package.__version__ for package in packages},
        "models": {},
    }
    if args.json.exists():
        before = json.loads(args.json.read_text())
        if before | {"models": {}} != result:
            raise SystemExit(
                f"{args.json} was measured otherwise: remove it, or choose another"
            )
        result = before
    recipes = {
        f"{scheme} {row}": make_recipe(scheme, row)
        for scheme in args.schemes
        for row in args.rows
    }
    recipes |= {name: Path(path).read_text() for name, path in args.recipes}
    held_out = read_held_out_texts()

    def save():
        args.json.parent.mkdir(parents=True, exist_ok=True)
        partial = args.json.with_suffix(".incomplete")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        shutil.move(partial, args.json)

    for model in args.models:
        rows = result["models"].setdefault(Path(model).name, {})
        texts = {"calibration": args.calibration, "held_out": held_out}
        measure_model(model, recipes, args.seeds, args.samples, rows, save, **texts)
    for name, rows in result["models"].items():
        show(name, rows)


def measure_model(model, recipes, seeds, samples, rows, save, calibration, held_out):
    """
    Measure what is missing of a model.

    :param recipes: recipes by row
    :param calibration: name of the calibration text
    :param held_out: texts by kind
    :param rows: receives the results
    :param save: called after each
    """
    missing = [(n, str(s)) for n in recipes for s in seeds if str(s) not in rows.get(n, {})]
    if not missing and "bf16" in rows:
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = {name: windows(held_out[name], tokenizer, 512, samples) for name in TEXTS}
    original = load(model)
    reference = {
        name: [log_probabilities(original, window).half() for window in one]
        for name, one in ids.items()
    }

    def measure(model) -> dict:
        return {name: evaluate(model, one, reference[name]) for name, one in ids.items()}

    if "bf16" not in rows:
        rows["bf16"] = {"0": measure(original)}
        save()
    for name, seed in missing:
        print(model, name, f"seed {seed}", file=sys.stderr)
        with TemporaryDirectory() as folder:
            try:
                make_checkpoint(model, Path(folder), recipes[name], calibration, int(seed))
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"{name}:\n{error.stderr[-3000:]}") from error
            quantized = load(Path(folder) / "checkpoint")
            if not any(is_module_quantized(one) for one in quantized.modules()):
                raise SystemExit(f"{name}: nothing is quantized")
            rows.setdefault(name, {})[seed] = measure(quantized)
        save()


if __name__ == "__main__":
    main()
