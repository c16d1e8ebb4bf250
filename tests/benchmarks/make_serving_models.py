# SPDX-License-Identifier: Apache-2.0
"""
Make what serving.py serves: a model in bfloat16, and quantized in each of the ways that are
compared. Runs in the compress environment.

    python tests/benchmarks/make_serving_models.py FOLDER [MODEL]

Without MODEL, one of random weights with the widths of Llama-3.2-1B, 4 layers of 16 and as
large a part of the vocabulary.
"""

import sys
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tiny_models import int_scheme, make_loader, make_model  # noqa: E402

from cat_modifier import CATModifier  # noqa: E402

SHAPE = {
    "vocab_size": 128256 // 4,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "dtype": torch.bfloat16,
    "tied": True,
}


def with_head() -> dict:
    """Scheme of W4A4, with the lm_head in W8A8"""
    linears = int_scheme(4, 4)["config_groups"]["group_0"]
    head = int_scheme(8, 8, targets=["lm_head"], format="int-quantized")
    groups = {"group_0": linears, "group_1": head["config_groups"]["group_0"]}
    return {"config_groups": groups, "ignore": []}


RECIPES = {
    "W8A8": lambda: [QuantizationModifier(**int_scheme(8, 8, format="int-quantized"))],
    "W4A16": lambda: [QuantizationModifier(**int_scheme(4, None))],
    "W4A4": lambda: [QuantizationModifier(**int_scheme(4, 4))],
    "W4A4-Hadamard": lambda: [
        CATModifier(alignment_strength=0.0, transform_block_size=1),
        QuantizationModifier(**int_scheme(4, 4)),
    ],
    "W4A4-CAT": lambda: [CATModifier(), QuantizationModifier(**int_scheme(4, 4))],
    "W4A4-CAT-W8A8-head": lambda: [
        CATModifier(ignore=[]),
        QuantizationModifier(**with_head()),
    ],
    "W4A4-CAT-32": lambda: [
        CATModifier(transform_block_size=32, rotation="block-hadamard"),
        QuantizationModifier(**int_scheme(4, 4)),
    ],
}


def main(folder: Path, original: Path | None):
    if original is None:
        original = folder / "bf16"
        make_model(original, **SHAPE)
    for name, recipe in RECIPES.items():
        model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
        ids = torch.randint(2, model.config.vocab_size, (4, 256))
        oneshot(
            model=model,
            recipe=recipe(),
            dataset=make_loader(ids),
            output_dir=str(folder / name),
        )
    if original != folder / "bf16":
        (folder / "bf16").symlink_to(original.resolve())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
