# SPDX-License-Identifier: Apache-2.0
"""
Make the mixtures of experts which test_moe.py serves, each with `reference.json`: token ids
and their log-probabilities according to the compressed model in memory. Part of
make_checkpoints.py.
"""

import json
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import int_scheme, make_loader, make_model, make_tokens
from torch.nn import Linear
from transformers import PreTrainedModel

from cat_modifier import CATModifier

# head sizes that vLLM's attention for CPUs has
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
IGNORE = [
    "re:.*lm_head",
    "re:.*mlp[.]gate$",
    "re:.*shared_expert_gate$",
    "re:.*block_sparse_moe[.]router.*",
]
W4A4 = int_scheme(4, 4)
SYMMETRIC = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True}
OWN_INPUTS = {"moe_calibrate_all_experts": False}
"""Options of oneshot by which an expert sees its own tokens alone: each has a transform"""

CASES = {
    # name: (family, quantization, CAT, options of oneshot)
    "qwen3-moe-w4a4": ("qwen3-moe", W4A4, {"transform_block_size": 32}, {}),
    "qwen3-moe-w4a4-overhead": ("qwen3-moe", W4A4, {"max_overhead": 0.25}, OWN_INPUTS),
    "qwen3-moe-w4a8-tp2": ("qwen3-moe", int_scheme(4, 8), {"tensor_parallel_size": 2}, {}),
    "qwen3-moe-w4a16": ("qwen3-moe", int_scheme(4, None), {}, {}),
    "qwen2-moe-w4a8": (
        "qwen2-moe",
        int_scheme(4, 8),
        {"transform_block_size": 32},
        OWN_INPUTS,
    ),
    "qwen2-moe-w4a4": ("qwen2-moe", W4A4, {}, {}),
    # not 4 bits: the largest value of a token, 7.5 steps, rounds by its last bits to 7 or 8
    "olmoe-w4a8-symmetric": (
        "olmoe",
        int_scheme(4, 8, input_activations={**SYMMETRIC, "dynamic": True}),
        {"rotation": "block-hadamard"},
        {},
    ),
    "granitemoe-w8a8": (
        "granitemoe",
        int_scheme(8, 8, format="int-quantized"),
        {"rotation": "none"},
        {},
    ),
    "glm4-moe-w4a4": ("glm4-moe", W4A4, {}, {}),
    "mixtral-w4a4": ("mixtral", W4A4, {}, {}),
    "stock-moe-w4a4": ("qwen3-moe", W4A4, None, {}),
}


def quantize_each_token(model: PreTrainedModel):
    """
    Give Linears inputs of three dimensions. compressed-tensors takes all tokens of an input
    of two dimensions, as experts have, for one.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            forward = module.forward
            module.forward = lambda x, forward=forward: (
                forward(x[None])[0] if x.ndim == 2 else forward(x)
            )


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, ids: torch.Tensor) -> list:
    return [
        model(row[None])
        .logits[0, :-1]
        .float()
        .log_softmax(-1)
        .gather(1, row[1:, None])[:, 0]
        .tolist()
        for row in ids
    ]


def make_mixture(folder: Path, name: str):
    family, scheme, cat, options = CASES[name]
    original = folder / "originals" / name
    model = make_model(original, family, **SIZES)
    recipe = [QuantizationModifier(**(scheme | {"ignore": IGNORE}))]
    if cat is not None:
        recipe.insert(0, CATModifier(**cat, ignore=IGNORE))
    target = folder / name
    oneshot(
        model=model,
        recipe=recipe,
        dataset=make_loader(make_tokens(8)),
        output_dir=str(target),
        **options,
    )
    # saving has compressed the weights, which the model decompresses when it runs
    quantize_each_token(model)
    ids = make_tokens(4, seed=1)
    reference = {"ids": ids.tolist(), "logprobs": logprobs_of(model, ids)}
    (target / "reference.json").write_text(json.dumps(reference))


def make_mixtures(folder: Path):
    for name in CASES:
        make_mixture(folder, name)
