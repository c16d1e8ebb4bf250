# SPDX-License-Identifier: Apache-2.0
"""
Make the checkpoint in `golden/` beside this script, with the log-probabilities that readers
must find. Run once for each version of the format:

    python tests/checkpoint/make_golden.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from tiny_models import int_scheme, make_loader, make_model, make_tokens  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from cat_modifier import CATModifier  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
KEPT = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

# Hadamard matrices of Paley orders; heads that vLLM's attention has
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def make_checkpoint(folder: Path):
    """Make a W4A4 checkpoint with schemes of all kinds"""
    model = make_model(folder / "original", family="qwen2", tied=True, **SIZES)
    first, last = (f"re:.*layers.{layer}.mlp.down_proj" for layer in (0, 1))
    recipe = [
        # blocks, online Hadamard matrix, clipping; attention fused, its Hadamard matrix online
        CATModifier(transform_block_size=16, precision="int8", ignore=["lm_head", first, last]),
        # another dtype
        CATModifier(transform_block_size=16, precision="bfloat16", targets=[first]),
        # blocks alone, of another size and dtype
        CATModifier(
            transform_block_size=32,
            rotation="block-hadamard",
            precision=torch.float32,
            targets=[last],
        ),
        QuantizationModifier(**int_scheme(4, 4)),
    ]
    loader = make_loader(make_tokens())
    oneshot(model=model, recipe=recipe, dataset=loader, output_dir=str(folder / "golden"))


@torch.no_grad()
def logprobs_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token but the first, shape (sequences, tokens - 1)"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0]


def main():
    ids = make_tokens(4, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "golden"
        make_checkpoint(Path(folder))
        logprobs = [[round(one, 5) for one in row] for row in logprobs_of(made, ids).tolist()]
        shutil.rmtree(GOLDEN, ignore_errors=True)
        GOLDEN.mkdir()
        for name in KEPT:
            shutil.copyfile(made / name, GOLDEN / name)
        sums = (made / "SHA256SUMS").read_text().splitlines(keepends=True)
        kept = (line for line in sums if line.split()[1] in KEPT)
        (GOLDEN / "SHA256SUMS").write_text("".join(kept))
    reference = {"ids": ids.tolist(), "logprobs": logprobs}
    (GOLDEN / "reference.json").write_text(json.dumps(reference) + "\n")


if __name__ == "__main__":
    main()
