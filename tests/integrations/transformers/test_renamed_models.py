# SPDX-License-Identifier: Apache-2.0
"""Models with tensors saved under older names than the names of their modules"""

from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from tiny_models import int_scheme, make_tokens, relative_error
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from cat_modifier import CATModifier

GOLDEN = Path(__file__).parents[2] / "checkpoint" / "golden"
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def combine(model_type: str, text: dict, vision: dict, **settings) -> PreTrainedConfig:
    return AutoConfig.for_model(
        model_type, text_config=TEXT | text, vision_config=VISION | vision, **settings
    )


CONFIGS = {
    # name: (config, beginning of the names of transforms in the files)
    "llava": (
        lambda: combine("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}),
        "language_model.model.layers.",
    ),
    "gemma3": (
        lambda: combine(
            "gemma3",
            {"model_type": "gemma3_text"},
            {"model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
        ),
        "language_model.model.layers.",
    ),
    "mistral3": (
        lambda: combine(
            "mistral3",
            {"model_type": "mistral"},
            {"model_type": "pixtral", "head_dim": 16},
            image_token_index=5,
        ),
        "language_model.model.layers.",
    ),
    "qwen2_5_vl": (
        lambda: combine(
            "qwen2_5_vl",
            {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
            {"depth": 2, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        ),
        "model.layers.",
    ),
    "vit": (lambda: AutoConfig.for_model("vit", **VISION), "vit.encoder.layer."),
    "swin": (
        lambda: AutoConfig.for_model(
            "swin",
            image_size=32,
            patch_size=4,
            embed_dim=32,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
        ),
        "swin.encoder.layers.",
    ),
    # with q, k and v merged in the file
    "nomic_bert": (
        lambda: AutoConfig.for_model("nomic_bert", **TEXT),
        "nomic_bert.encoder.layers.",
    ),
    # with the gate of attention as well, and gates and inputs of the MLP
    "hrm_text": (
        # each layer runs several times, which counts as several layers
        lambda: AutoConfig.for_model(
            "hrm_text", **TEXT | {"num_layers_per_stack": 2, "num_hidden_layers": 16}
        ),
        "model.L_module.layers.",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_with_older_names_is_read_back(tmp_path, name):
    make_config, prefix = CONFIGS[name]
    is_vision = name in ("vit", "swin")
    auto = AutoModelForImageClassification if is_vision else AutoModelForImageTextToText
    auto = {"nomic_bert": AutoModelForMaskedLM, "hrm_text": AutoModelForCausalLM}.get(
        name, auto
    )
    torch.manual_seed(0)
    auto.from_config(make_config()).save_pretrained(tmp_path / "original")
    model = auto.from_pretrained(tmp_path / "original").eval()
    if is_vision:
        samples = [{"pixel_values": torch.randn(3, 32, 32)} for _ in range(8)]
    else:
        samples = [{"input_ids": ids, "attention_mask": ids > 0} for ids in make_tokens(8)]
    ignore = ["lm_head", "re:.*(classifier|decoder)$", "re:.*(vision_tower|visual).*"]
    scheme = int_scheme(4, 4) | {"ignore": ignore}
    oneshot(
        model=model,
        recipe=[
            CATModifier(transform_block_size=16, ignore=ignore),
            QuantizationModifier(**scheme),
        ],
        dataset=DataLoader(samples, batch_size=1),
        # oneshot needs a tokenizer, any tokenizer
        processor=AutoTokenizer.from_pretrained(GOLDEN),
        output_dir=str(tmp_path / "saved"),
    )
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        names = [key for key in file.keys() if ".cat_input." in key]
    modules = dict(model.named_modules())
    renamed = [key for key in names if key.removesuffix(".weight") not in modules]
    assert sum(key.startswith(prefix) for key in renamed) >= 4
    if name == "nomic_bert":
        assert sum("Wqkv" in key for key in renamed) == 2
    if name == "hrm_text":
        for part in ("gqkv_proj", "gate_up_proj"):
            assert sum(f"{part}.cat_input" in key for key in renamed) == 4

    def logits(one):
        batch = next(iter(DataLoader(samples, batch_size=2)))
        with torch.no_grad():
            return one(**batch).logits

    loaded = auto.from_pretrained(tmp_path / "saved").eval()
    assert relative_error(logits(loaded), logits(model)) < 1e-5
    loaded.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again").eval()
    assert relative_error(logits(again), logits(model)) < 1e-5
