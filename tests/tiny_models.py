# SPDX-License-Identifier: Apache-2.0
"""Small models of random weights that differ like real ones: biases, tied embeddings"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from cat_modifier.checkpoint.digest import tensor_digest
from cat_modifier.checkpoint.schema import TENSOR_SUFFIX, mark_quantization_config

VOCABULARY = 128

FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},  # biases of q, k and v
    "qwen3": {"model_type": "qwen3"},  # norms of q and k
    "cohere": {"model_type": "cohere"},  # attention and MLP read the same input
    "qwen3-moe": {"model_type": "qwen3_moe"},  # experts
}

SERVED_FAMILIES = {
    # experts
    "qwen2-moe": {  # a shared expert, with a gate of its own
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 96,
    },
    "olmoe": {"model_type": "olmoe"},
    "mixtral": {"model_type": "mixtral"},
    "granitemoe": {"model_type": "granitemoe"},
    "glm4-moe": {  # shared experts, and routing with a correction
        "model_type": "glm4_moe",
        "first_k_dense_replace": 0,
        "partial_rotary_factor": 0.5,
    },
    # Linears that the checkpoint holds merged
    "glm4": {"model_type": "glm4", "partial_rotary_factor": 0.5},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    # norms before and after, or after alone; local attention; multipliers
    "gemma3": {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 2},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite", "residual_multiplier": 0.5},
    # merged by vLLM, which does not say so
    "stablelm": {"model_type": "stablelm"},
    "gptj": {"model_type": "gptj", "rotary_dim": 16},
    # multi-head latent attention, of the sizes that vLLM has on CPUs; no experts
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
    # one layer of each kind; that of full attention has no v_proj
    "gemma4": {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    # a state space and attention, one layer each; no experts
    "granite-hybrid": {
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 192,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
    },
    # vLLM does not quantize its mixers
    "mamba": {"model_type": "mamba", "state_size": 16, "time_step_rank": 64},
}
"""Families in which vLLM differs from Transformers"""

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
VISION_LANGUAGE = {
    # family: (text config, vision config, processor)
    "qwen2_5_vl": (
        {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}},
        {"window_size": 16, "fullatt_block_indexes": [1]},
        "Qwen2_5_VL",
    ),
    # a gated delta rule and attention, one layer each
    "qwen3_5": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": _ROPE
            | {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25},
        },
        {"num_position_embeddings": 64},
        "Qwen3VL",
    ),
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
    config = AutoConfig.for_model(
        **(settings | (FAMILIES | SERVED_FAMILIES)[family] | overrides)
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def make_whisper(folder: Path, decoder_layers: int) -> PreTrainedModel:
    """
    A speech model of encoder and decoder, saved to the folder together with what its
    processor needs. Its windows of a second are 40 frames of 8 mel bins.
    """
    config = WhisperConfig(
        d_model=128,  # heads of 32 channels, the least that vLLM's attention for CPUs has
        encoder_layers=2,
        decoder_layers=decoder_layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForSpeechSeq2Seq.from_config(config)
    randomize(model)
    with torch.no_grad():  # speech is to matter, beside positions
        model.model.encoder.conv1.weight.mul_(20)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    extractor = WhisperFeatureExtractor(
        feature_size=8,
        chunk_length=1,
        hop_length=400,
        processor_class="WhisperProcessor",
    )
    extractor.save_pretrained(folder)
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()


@torch.no_grad()
def randomize(model: PreTrainedModel):
    """Biases that are not zero, and channels of different size: something to align"""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.5)
        elif name.endswith("norm.weight"):
            parameter.copy_(
                torch.logspace(-1, 1, parameter.numel())[torch.randperm(parameter.numel())]
            )
        else:
            parameter.mul_(3)


def save_tokenizer(folder: Path, **special_tokens: str):
    """Words <0>, <1>, ..."""
    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<2>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<0>",
        eos_token="<1>",
        pad_token="<1>",
        extra_special_tokens=special_tokens,
    )
    tokenizer.save_pretrained(folder)


def make_vision_language_model(
    folder: Path, family: str = "qwen2_5_vl", tied: bool = False
) -> PreTrainedModel:
    """
    Qwen2.5-VL or Qwen3.5, saved to the folder together with what its processor needs.

    :param tied: whether the lm_head is tied to the embedding
    """
    torch.manual_seed(0)
    tokens = {"vision_start": 3, "vision_end": 4, "image": 5, "video": 6}
    text, vision, processor = VISION_LANGUAGE[family]
    config = AutoConfig.for_model(
        family,
        text_config={
            "model_type": f"{family}_text",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "tie_word_embeddings": tied,
        }
        | text,
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 4,
            "spatial_merge_size": 2,
        }
        | vision,
        tie_word_embeddings=tied,
        **{f"{name}_token_id": token for name, token in tokens.items()},
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    model.save_pretrained(folder)
    save_tokenizer(folder, **{f"{name}_token": f"<{i}>" for name, i in tokens.items()})
    # as files: processors of pictures need torchvision, which not all environments have
    sizes = {
        "size": {"shortest_edge": 64, "longest_edge": 4096},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        # vLLM and Transformers have other defaults of these
        "min_pixels": 64,
        "max_pixels": 4096,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": f"{processor}Processor",
    }
    video = "Qwen3VL" if family == "qwen3_5" else "Qwen2VL"
    for file, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": f"{video}VideoProcessor"}),
    ):
        (folder / file).write_text(json.dumps(sizes | kind))
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


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


def decibels(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Energy of what is expected over that of the difference"""
    energies = expected.double().square().sum(), (value - expected).double().square().sum()
    return 10 * (energies[0] / energies[1]).log10().item()


def replace_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    """
    Replace the tensors of a checkpoint's file, and the digests of its transforms: readers
    take it for a whole checkpoint of other transforms.
    """
    config = path.parent / "config.json"
    content = json.loads(config.read_text())
    schemes = content["quantization_config"]["transform_config"]["config_groups"].values()
    entries = [entry for scheme in schemes for entry in scheme["apply"]]
    for name, before in load_file(path).items():
        if name.endswith(TENSOR_SUFFIX) and not torch.equal(before, tensors.get(name, before)):
            # rotations alone are the same tensor; files may have older names
            same = [one for one in entries if one.get("sha256") == tensor_digest(before)]
            named = [one for one in same if one["targets"][0] + TENSOR_SUFFIX == name]
            (named or same)[0]["sha256"] = tensor_digest(tensors[name])
    content["quantization_config"] = mark_quantization_config(content["quantization_config"])
    config.write_text(json.dumps(content))
    save_file(tensors, path, metadata={"format": "pt"})


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
