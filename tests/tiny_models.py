# SPDX-License-Identifier: Apache-2.0
"""Small models of random weights that differ like real ones: biases, tied embeddings"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128

FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},  # biases of q, k and v
    "qwen3": {"model_type": "qwen3"},  # norms of q and k
    "cohere": {"model_type": "cohere"},  # attention and MLP read the same input
    "qwen3-moe": {"model_type": "qwen3_moe"},  # experts
}


def make_model(
    folder: Path,
    family: str = "llama",
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides,
) -> PreTrainedModel:
    """Make a model, and save it with a tokenizer"""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = AutoConfig.for_model(**(settings | FAMILIES[family] | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif name.endswith("norm.weight"):
                # unequal channels, so that there is something to align
                parameter.copy_(
                    torch.logspace(-1, 1, parameter.numel())[torch.randperm(parameter.numel())]
                )
            else:
                parameter.mul_(3)
    model.to(dtype).save_pretrained(folder)
    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<2>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<0>",
        eos_token="<1>",
        pad_token="<1>",
    )
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_tokens(batches: int = 4, length: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batches, length), generator=generator)


def make_loader(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> DataLoader:
    """Make a loader with batches of one sample"""
    mask = torch.ones_like(tokens) if mask is None else mask
    samples = [
        {"input_ids": ids, "attention_mask": real}
        for ids, real in zip(tokens, mask, strict=True)
    ]
    return DataLoader(samples, batch_size=1)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    return model(make_tokens(2, seed=1) if tokens is None else tokens).logits.double()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def int_scheme(weight_bits: int, input_bits: int | None, **overrides) -> dict:
    """Make an integer scheme like in recipes/"""
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": {"num_bits": weight_bits, "type": "int", "strategy": "channel"},
    }
    if input_bits is not None:
        group["input_activations"] = {
            "num_bits": input_bits,
            "type": "int",
            "strategy": "token",
            "symmetric": False,
            "dynamic": True,
        }
    return {"config_groups": {"group_0": group | overrides}, "ignore": ["lm_head"]}
