# SPDX-License-Identifier: Apache-2.0
"""Models that read weights of their Linears to initialize what a checkpoint does not have"""

from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tiny_models import decibels, int_scheme, make_tokens
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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_read_back(name, tmp_path):
    auto, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    auto.from_config(config).save_pretrained(tmp_path / "original")
    model = auto.from_pretrained(tmp_path / "original").eval()
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
        output_dir=str(tmp_path / "saved"),
    )
    expected = outputs(model, samples)

    def agreement():
        loaded = auto.from_pretrained(tmp_path / "saved").eval()
        return decibels(outputs(loaded, samples), expected)

    assert agreement() > 110
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    blocks = [key for key in tensors if key.endswith(".cat_input.weight")]
    tensors[blocks[0]] = tensors[blocks[0]].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    assert agreement() < 80
