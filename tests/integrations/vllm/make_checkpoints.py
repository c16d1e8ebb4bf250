# SPDX-License-Identifier: Apache-2.0
"""
Make the checkpoints which the tests in this folder serve, each with `reference.json`: token
ids and their log-probabilities according to Transformers. Runs in the compress environment.

    python tests/integrations/vllm/make_checkpoints.py FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples"), str(Path(__file__).parent)]

from embedded_model import write_embedded_model  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from make_mixtures import make_mixtures  # noqa: E402
from tiny_models import (  # noqa: E402
    VISION_LANGUAGE,
    int_scheme,
    make_loader,
    make_model,
    make_tokens,
    make_vision_language_model,
    make_whisper,
)
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
)

from cat_modifier import CATModifier, CATTrainingModifier  # noqa: E402
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows  # noqa: E402

# head sizes that vLLM's attention for CPUs has
TINY = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
W4A4 = int_scheme(4, 4)
SYMMETRIC = {"num_bits": 4, "type": "int", "strategy": "token", "symmetric": True}

MIXED = W4A4 | {
    "config_groups": {
        "w4a4": W4A4["config_groups"]["group_0"] | {"targets": ["re:.*layers.0.*"]},
        "w8a8": int_scheme(8, 8, format="int-quantized")["config_groups"]["group_0"]
        | {"targets": ["re:.*layers.1.*"]},
    }
}

HEAD = {
    "config_groups": {
        "w4a4": W4A4["config_groups"]["group_0"],
        "w8a8": int_scheme(8, 8, format="int-quantized")["config_groups"]["group_0"]
        | {"targets": ["re:.*lm_head"]},
    },
    "ignore": [],
}

TINY_CASES = {
    # name: (model, quantization, CAT)
    "qwen2-w4a4": (
        {"family": "qwen2"},
        W4A4,
        {"max_overhead": 0.15, "tensor_parallel_size": 1},
    ),
    "qwen2-w4a8": ({"family": "qwen2"}, int_scheme(4, 8), {}),
    # two ranks share the KV head
    "qwen3-w4a8-1-kv-head": (
        {"family": "qwen3", "num_key_value_heads": 1},
        int_scheme(4, 8),
        {},
    ),
    "llama-w4a4-biases": (
        {"family": "llama-biases", "tied": True},
        W4A4,
        {"transform_block_size": 32},
    ),
    "llama-w4a4-symmetric": (
        {},
        int_scheme(4, 4, input_activations={**SYMMETRIC, "dynamic": True}),
        {"rotation": "eigen-hadamard"},
    ),
    "qwen3-w4a4-int-quantized": (
        {"family": "qwen3"},
        int_scheme(4, 4, format="int-quantized"),
        {"rotation": "none"},
    ),
    "cohere-w4a4": ({"family": "cohere", "tied": True}, W4A4, {}),
    "llama-w4a8": (
        {"family": "llama-biases"},
        int_scheme(4, 8),
        {"fuse_attention": False},
    ),
    "llama-w8a8": (
        {"family": "llama-biases"},
        int_scheme(8, 8, format="int-quantized"),
        {},
    ),
    "qwen3-mixed": ({"family": "qwen3"}, MIXED, {}),
    # vLLM pads the rows of these heads
    "llama-w4a4-w8a8-head": ({"tied": True, "vocab_size": 500}, HEAD, {"ignore": []}),
    "qwen3-w4a8-head": (
        {"family": "qwen3", "vocab_size": 500},
        int_scheme(4, 8, targets=["Linear", "lm_head"]) | {"ignore": []},
        {"ignore": []},
    ),
    # compressed-tensors decompresses 4-bit floats to bfloat16, whatever the model
    "llama-nvfp4": (
        {"family": "llama-biases", "dtype": torch.bfloat16},
        {"scheme": "NVFP4", "ignore": ["lm_head"]},
        {"transform_block_size": 32, "rotation": "block-hadamard"},
    ),
    "qwen3-mxfp4": (
        {"family": "qwen3", "dtype": torch.bfloat16},
        {"scheme": "MXFP4", "ignore": ["lm_head"]},
        {"transform_block_size": 32, "rotation": "block-hadamard"},
    ),
    # vLLM's kernel for CPUs takes bfloat16 alone
    "llama-w4a16": ({"dtype": torch.bfloat16}, int_scheme(4, None), {}),
    "glm4-w4a4": ({"family": "glm4"}, W4A4, {}),
    "phi3-w4a4": ({"family": "phi3"}, W4A4, {}),
    "gemma3-w4a4": ({"family": "gemma3"}, W4A4, {}),
    "olmo2-w4a4": ({"family": "olmo2"}, W4A4, {}),
    "granite-w4a4": ({"family": "granite"}, W4A4, {}),
    "stablelm-w4a8": ({"family": "stablelm"}, int_scheme(4, 8), {}),
    "gptj-w4a4": ({"family": "gptj"}, W4A4, {}),
    "deepseek-w4a4": (
        {"family": "deepseek_v3", "head_dim": 64},
        W4A4 | {"ignore": ["lm_head", "re:.*kv_b_proj"]},
        {"ignore": ["lm_head", "re:.*kv_b_proj"]},
    ),
    "deepseek-w4a4-kv_b_proj": (
        {"family": "deepseek_v3", "head_dim": 64},
        W4A4,
        {"ignore": ["lm_head"]},
    ),
    "gemma4-w4a4": ({"family": "gemma4", "tied": True}, W4A4, {}),
    "granite-hybrid-w4a4": ({"family": "granite-hybrid"}, W4A4, {}),
    "mamba-w4a4": ({"family": "mamba"}, W4A4, {}),
    "stock-w4a4": ({}, W4A4, None),
    "stock-w8a8": ({}, int_scheme(8, 8, format="int-quantized"), None),
}

TRAINED = {"llama-w4a4-biases", "cohere-w4a4"}
"""Cases whose transforms are trained, a little"""


@torch.no_grad()
def write_reference(folder: Path, ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    logprobs = torch.cat(
        [
            model(row[None]).logits[0, :-1].float().log_softmax(-1).gather(1, row[1:, None])
            for row in ids
        ],
        dim=1,
    )
    reference = {"ids": ids.tolist(), "logprobs": logprobs.T.tolist()}
    (folder / "reference.json").write_text(json.dumps(reference))


def make_tiny(folder: Path, name: str):
    options, scheme, cat = TINY_CASES[name]
    model = make_model(folder / "originals" / name, **(TINY | options))
    recipe = [QuantizationModifier(**scheme)]
    if cat is not None:
        recipe.insert(0, CATModifier(**cat))
    if name in TRAINED:
        recipe.insert(1, CATTrainingModifier(steps=4))
    loader = make_loader(make_tokens())
    oneshot(model=model, recipe=recipe, dataset=loader, output_dir=str(folder / name))
    write_reference(folder / name, make_tokens(4, seed=1))


def make_vision_language(folder: Path, family: str):
    """A vision-language model, with what its processor needs of files"""
    original, target = folder / "originals" / family, folder / f"{family}-w4a8"
    model = make_vision_language_model(original, family)
    ignore = ["re:.*lm_head", "re:.*visual.*"]
    tokens = make_tokens()
    tokens[tokens < 7] = 7  # those stand for pictures
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(original),
        recipe=[
            CATModifier(ignore=ignore),
            QuantizationModifier(**int_scheme(4, 8) | {"ignore": ignore}),
        ],
        dataset=make_loader(tokens),
        output_dir=str(target),
    )
    for file in original.glob("*preprocessor_config.json"):
        shutil.copy(file, target)


def make_speech(folder: Path):
    """Whisper, with what its processor needs of files"""
    original, target = folder / "originals" / "whisper", folder / "whisper-w4a4"
    model = make_whisper(original, decoder_layers=2)
    ignore = ["re:.*proj_out"]  # vLLM ties it to the embedding
    samples = [
        {"input_features": features, "decoder_input_ids": ids}
        for features, ids in zip(torch.randn(4, 8, 40), make_tokens(), strict=True)
    ]
    oneshot(
        model=model,
        processor=AutoProcessor.from_pretrained(original),
        recipe=[
            CATModifier(ignore=ignore),
            QuantizationModifier(**W4A4 | {"ignore": ignore}),
        ],
        dataset=DataLoader(samples, batch_size=1),
        output_dir=str(target),
    )


@torch.no_grad()
def make_pooling(folder: Path, task: str):
    """
    A base model without a head, whose last token's hidden state is the embedding, or a
    classifier. `reference.json` holds embeddings, or probabilities of classes, as `values`.
    """
    original, target = folder / "originals" / f"qwen3-{task}", folder / f"qwen3-{task}-w4a4"
    make_model(original, family="qwen3", **TINY)
    auto = {"embed": AutoModel, "classify": AutoModelForSequenceClassification}[task]
    model = auto.from_pretrained(original)
    if task == "classify":
        model.score.weight.normal_(std=0.1)
        # llm-compressor copies the name of the class from the original's config
        model.save_pretrained(original)
        model = auto.from_pretrained(original)
    recipe = [CATModifier(), QuantizationModifier(**W4A4)]
    loader = make_loader(make_tokens())
    oneshot(model=model, recipe=recipe, dataset=loader, output_dir=str(target))
    model = auto.from_pretrained(target, dtype="auto").eval()
    ids = make_tokens(4, seed=1)
    if task == "embed":
        values = torch.stack([model(row[None]).last_hidden_state[0, -1] for row in ids])
        values = torch.nn.functional.normalize(values.float(), dim=-1)
    else:
        values = torch.stack([model(row[None]).logits[0] for row in ids]).float().softmax(-1)
    reference = {"ids": ids.tolist(), "values": values.tolist()}
    (target / "reference.json").write_text(json.dumps(reference))


def pad_heads(source: Path, target: Path):
    """
    SmolLM2's 9 query and 3 key-value heads cannot be divided among 2 ranks. With heads of
    zero weight added, 12 and 4, it computes the same.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    head = config.head_dim
    state = model.state_dict()
    for name in list(state):
        heads = {"q_proj": 12, "k_proj": 4, "v_proj": 4, "o_proj": 12}.get(name.split(".")[-2])
        if heads is None:
            continue
        axis = 1 if "o_proj" in name else 0
        shape = list(state[name].shape)
        shape[axis] = heads * head - shape[axis]
        state[name] = torch.cat(
            [state[name], torch.zeros(shape, dtype=state[name].dtype)], axis
        )
    config.num_attention_heads, config.num_key_value_heads = 12, 4
    padded = LlamaForCausalLM(config).to(torch.bfloat16)
    padded.load_state_dict(state)
    padded.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def make_real(folder: Path, name: str, original: Path, samples: int, cat: dict):
    model = AutoModelForCausalLM.from_pretrained(original)
    tokenizer = AutoTokenizer.from_pretrained(original)
    calibration = windows(load_texts(EMBEDDED, "train"), tokenizer, 512, samples)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=[CATModifier(**cat), QuantizationModifier(**W4A4)],
        dataset=make_loader(calibration),
        output_dir=str(folder / name),
    )
    held_out = windows(load_texts(EMBEDDED, "test"), tokenizer, 256, 32)
    write_reference(folder / name, held_out)


def main(folder: Path):
    write_embedded_model(folder / "originals" / "smollm2")
    make_real(folder, "smollm2-w4a4", folder / "originals" / "smollm2", 16, {})
    pad_heads(folder / "originals" / "smollm2", folder / "originals" / "smollm2-padded")
    make_real(
        folder,
        "smollm2-padded-w4a4",
        folder / "originals" / "smollm2-padded",
        4,
        {},
    )
    for family in VISION_LANGUAGE:
        make_vision_language(folder, family)
    make_speech(folder)
    for name in TINY_CASES:
        make_tiny(folder, name)
    for task in ("embed", "classify"):
        make_pooling(folder, task)
    make_mixtures(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
