# SPDX-License-Identifier: Apache-2.0
"""
Make the small checkpoints that `run_gpu.py` serves, and what Transformers computes of them.

    python tests/integrations/vllm/make_gpu_models.py FOLDER

Runs in the compress environment. Random weights, with channels of very different sizes.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from make_checkpoints import SYMMETRIC
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from tiny_models import int_scheme, make_loader, make_model  # noqa: E402

from cat_modifier import CATModifier  # noqa: E402

VOCABULARY = 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "dtype": torch.float32,
    "tied": False,
}
SYMMETRIC_INPUTS = {"input_activations": {**SYMMETRIC, "dynamic": True}}


def rounded(*bits, **options) -> QuantizationModifier:
    return QuantizationModifier(**int_scheme(*bits, **options))


# 4-bit rounding is not continuous: errors of 16 bits grow from layer to layer
ONE_LAYER = {
    "one-layer-w4a4": lambda: [rounded(4, 4)],
    "one-layer-w4a4-cat": lambda: [CATModifier(), rounded(4, 4)],
    "one-layer-w4a4-cat-symmetric": lambda: [CATModifier(), rounded(4, 4, **SYMMETRIC_INPUTS)],
    "one-layer-w4a4-hadamard": lambda: [
        CATModifier(alignment_strength=0.0, transform_block_size=1),
        rounded(4, 4),
    ],
}
FOUR_LAYERS = {
    "w4a4-cat": lambda: [CATModifier(), rounded(4, 4)],
    "w4a8-cat": lambda: [CATModifier(), rounded(4, 8)],
    "w4a16-cat": lambda: [CATModifier(), rounded(4, None)],
    "w8a8-cat": lambda: [CATModifier(), rounded(8, 8, format="int-quantized")],
}


def make_original(folder: Path, layers: int):
    model = make_model(folder, **SHAPE, num_hidden_layers=layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, one in model.named_parameters():
            values = torch.randn(one.shape, generator=generator)
            if "norm" in name:
                one.copy_((0.7 * values).exp())
            else:
                size = 1.0 if "embed" in name else 0.05 if "lm_head" in name else 0.03
                one.copy_(size * values)
    model.save_pretrained(folder)


@torch.no_grad()
def log_probabilities(folder: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute those of the tokens of each row but the first, shape (rows, tokens - 1)"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(dtype)
    rows = []
    for row in ids:
        found = model(row[None]).logits[0, :-1].float().log_softmax(-1)
        rows.append(found.gather(1, row[1:, None])[:, 0])
    return torch.stack(rows)


def write_reference(folder: Path, ids: Tensor):
    exact = log_probabilities(folder, ids, torch.float32)
    error = exact - log_probabilities(folder, ids, torch.float16)
    is_cat = "cat" in folder.name or "hadamard" in folder.name
    reference = {
        "ids": ids.tolist(),
        "logprobs": exact.tolist(),
        "half_db": 10 * math.log10(exact.var() / error.var()),
        "is_cat": is_cat,
        "needs_kernels": not is_cat,
    }
    (folder / "reference.json").write_text(json.dumps(reference))


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    data, ids = (torch.randint(2, VOCABULARY, (4, length)) for length in (256, 200))
    for layers, recipes in ((1, ONE_LAYER), (4, FOUR_LAYERS)):
        original = args.folder / f"original-{layers}"
        make_original(original, layers)
        for name, recipe in recipes.items():
            model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
            output = args.folder / name
            oneshot(
                model=model,
                recipe=recipe(),
                dataset=make_loader(data),
                output_dir=str(output),
            )
            write_reference(output, ids)


if __name__ == "__main__":
    main()
