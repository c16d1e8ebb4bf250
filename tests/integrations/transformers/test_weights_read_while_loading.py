# SPDX-License-Identifier: Apache-2.0
"""Models that need the weights of their Linears earlier than in their own forward pass"""

import copy
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny_models import decibels, int_scheme, make_tokens, replace_tensors
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from cat_modifier import CATModifier

GOLDEN = Path(__file__).parents[2] / "checkpoint" / "golden"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = SIZES | {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128, "vocab_size": 128}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
FAMILIES = {
    "falcon": (AutoModelForCausalLM, TEXT | {"ffn_hidden_size": 128}),
    "gpt_bigcode": (AutoModelForCausalLM, GPT | {"n_positions": 128}),
    "nanochat": (AutoModelForCausalLM, TEXT | {"num_key_value_heads": 2}),
    "recurrent_gemma": (
        AutoModelForCausalLM,
        TEXT
        | {"num_key_value_heads": 1, "lru_width": 64, "attention_window_size": 16}
        | {"block_types": ["recurrent", "attention"]},
    ),
    "rwkv": (AutoModelForCausalLM, TEXT | {"attention_hidden_size": 64}),
    "modernbert": (AutoModelForMaskedLM, TEXT | {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5 | {"vocab_size": 128, "pad_token_id": 0, "decoder_start_token_id": 0},
    ),
    "dinov2": (AutoModel, SIZES | {"image_size": 32, "patch_size": 8}),
    "wav2vec2": (
        AutoModelForCTC,
        SIZES
        | {"vocab_size": 32, "num_feat_extract_layers": 2, "conv_dim": [32, 32]}
        | {"conv_stride": [5, 2], "conv_kernel": [10, 3]}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
}


def make_samples(name):
    generator = torch.Generator().manual_seed(0)
    if name == "dinov2":
        return [{"pixel_values": one} for one in torch.randn(4, 3, 32, 32, generator=generator)]
    if name == "wav2vec2":
        return [{"input_values": one} for one in torch.randn(4, 800, generator=generator)]
    samples = [{"input_ids": ids, "attention_mask": ids > 0} for ids in make_tokens()]
    if name == "t5":
        return [one | {"decoder_input_ids": one["input_ids"]} for one in samples]
    return samples


@torch.no_grad()
def outputs(model, samples):
    result = model(**next(iter(DataLoader(samples, batch_size=2))))
    return result[0].double()


def compress(name, folder):
    """The model, its outputs, and its checkpoint"""
    auto, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    auto.from_config(config).save_pretrained(folder / "original")
    model = auto.from_pretrained(folder / "original").eval()
    samples = make_samples(name)
    ignore = ["re:.*head.*"]
    oneshot(
        model=model,
        recipe=[
            CATModifier(transform_block_size=16, ignore=ignore),
            QuantizationModifier(**int_scheme(4, 4) | {"ignore": ignore}),
        ],
        dataset=DataLoader(samples, batch_size=1),
        processor=AutoTokenizer.from_pretrained(GOLDEN),  # any, which oneshot asks for
        output_dir=str(folder / "saved"),
    )
    return model, outputs(model, samples), folder / "saved"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_read_back(name, tmp_path):
    _, expected, folder = compress(name, tmp_path)

    def agreement():
        loaded = FAMILIES[name][0].from_pretrained(folder).eval()
        return decibels(outputs(loaded, make_samples(name)), expected)

    assert agreement() > 110
    path = folder / "model.safetensors"
    tensors = load_file(path)
    blocks = [key for key in tensors if key.endswith(".cat_input.weight")]
    tensors[blocks[0]] = tensors[blocks[0]].flip(0).contiguous()
    replace_tensors(path, tensors)
    assert agreement() < 80


def test_an_encoder_runs_before_the_model(tmp_path):
    _, _, folder = compress("t5", tmp_path)
    samples = make_samples("t5")
    tokens = samples[0]["input_ids"][None]

    def generate(model):
        return model.generate(tokens, max_new_tokens=8, min_new_tokens=8)

    model = FAMILIES["t5"][0].from_pretrained(folder).eval()
    copied = copy.deepcopy(model)
    generated = generate(model)
    assert torch.equal(generate(copied), generated)
    last = FAMILIES["t5"][0].from_pretrained(folder).eval()
    outputs(last, samples)  # the whole model first
    assert torch.equal(generate(last), generated)
