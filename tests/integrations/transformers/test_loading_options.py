# SPDX-License-Identifier: Apache-2.0
"""What users pass to ``from_pretrained``, and other classes than the one that was saved"""

import json

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tiny_models import (
    decibels,
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    replace_tensors,
)
from torch.nn import Linear, ModuleList
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2ForCausalLM,
)

from cat_modifier import CATModifier
from cat_modifier.checkpoint.transform_module import CATTransform

SAME = 110
"""Decibels between two models that are one"""


def quantize(model, folder, scheme=None, **saving):
    oneshot(
        model=model,
        recipe=[
            CATModifier(transform_block_size=16),
            QuantizationModifier(**scheme or int_scheme(4, 4)),
        ],
        dataset=make_loader(make_tokens()),
    )
    model.save_pretrained(folder, **saving)
    return logits_of(model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    model = make_model(folder / "original", family="qwen2")
    logits = quantize(model, folder / "quantized", max_shard_size="100KB")
    assert len(list((folder / "quantized").glob("model-*.safetensors"))) > 1
    return folder / "quantized", logits


def load(folder, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, **options).eval()


def exchange_blocks(folder):
    """Reverse the blocks of one transform: what every threshold here must notice"""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "layers.0.mlp.gate_proj.cat_input" in name:
                tensors[name] = tensors[name].flip(0).contiguous()
        replace_tensors(path, tensors)


def test_shards(checkpoint, tmp_path):
    folder, expected = checkpoint
    assert decibels(logits_of(load(folder)), expected) > SAME
    load(folder).save_pretrained(tmp_path)
    exchange_blocks(tmp_path)
    assert decibels(logits_of(load(tmp_path)), expected) < 30


PLACES = dict.fromkeys(
    ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head"), "cpu"
)


@pytest.mark.parametrize(
    "places",
    [PLACES | {"model.layers.1": "disk"}, {"": "disk"}, "auto"],
    ids=["a layer on disk", "disk", "auto"],
)
@pytest.mark.parametrize("forward_first", [False, True])
def test_offloading(checkpoint, places, forward_first, tmp_path):
    folder, expected = checkpoint
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    if forward_first:
        assert decibels(logits_of(model), expected) > SAME
    model.save_pretrained(tmp_path / "again")
    assert decibels(logits_of(load(tmp_path / "again")), expected) > SAME
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype, least", [("float16", 40), ("bfloat16", 25)])
def test_another_dtype_than_the_stored_one(dtype, least, tmp_path):
    # 16-bit inputs: rounding would move 4-bit inputs to other integers
    model = make_model(tmp_path / "original")
    expected = quantize(model, tmp_path / "quantized", int_scheme(4, None))
    loaded = load(tmp_path / "quantized", dtype=dtype)
    assert decibels(logits_of(loaded), expected) > least
    transforms = [part.weight for part in loaded.modules() if isinstance(part, CATTransform)]
    assert {blocks.dtype for blocks in transforms if blocks is not None} == {torch.int8}
    exchange_blocks(tmp_path / "quantized")
    assert decibels(logits_of(load(tmp_path / "quantized", dtype=dtype)), expected) < 20


def test_float16_with_a_channel_near_its_limit(tmp_path):
    model = make_model(tmp_path / "original", dtype=torch.float16)
    largest = []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[5] = 1.2e4
            norm.register_forward_hook(
                lambda module, args, output: largest.append(output.abs().max().item())
            )
        readers = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        for linear in (*readers, layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[:, 5] *= 1e-4
    expected = quantize(model, tmp_path / "quantized", int_scheme(8, 8, format="int-quantized"))
    assert 3e4 < max(largest) < 6e4
    assert torch.isfinite(expected).all()
    loaded = load(tmp_path / "quantized")
    assert loaded.dtype == torch.float16
    assert decibels(logits_of(loaded), expected) > SAME
    exchange_blocks(tmp_path / "quantized")
    assert not decibels(logits_of(load(tmp_path / "quantized")), expected) > 30


@torch.no_grad()
def hidden_states(model):
    return model(make_tokens(2, seed=1), output_hidden_states=True).hidden_states[-1].double()


def test_the_body_of_a_model(checkpoint, tmp_path):
    expected = hidden_states(load(checkpoint[0]))
    body = load(checkpoint[0], AutoModel)
    assert decibels(hidden_states(body), expected) > SAME
    body.save_pretrained(tmp_path)
    assert decibels(hidden_states(load(tmp_path, AutoModel)), expected) > SAME
    # and back, beside a head
    assert decibels(hidden_states(load(tmp_path)), expected) > SAME
    exchange_blocks(tmp_path)
    assert decibels(hidden_states(load(tmp_path, AutoModel)), expected) < 30


def test_a_new_head(checkpoint, tmp_path):
    expected = hidden_states(load(checkpoint[0]))
    model = load(checkpoint[0], AutoModelForSequenceClassification)
    assert decibels(hidden_states(model), expected) > SAME
    model.save_pretrained(tmp_path)
    again = load(tmp_path, AutoModelForSequenceClassification)
    assert torch.equal(again.score.weight, model.score.weight)
    assert decibels(logits_of(again), logits_of(model)) > SAME


def test_a_head_that_the_class_should_have_is_no_new_one(tmp_path):
    model = make_model(tmp_path / "original", family="qwen2")
    scheme = int_scheme(4, 4) | {"ignore": []}
    oneshot(
        model=model,
        recipe=[CATModifier(transform_block_size=16), QuantizationModifier(**scheme)],
        dataset=make_loader(make_tokens()),
        output_dir=str(tmp_path / "quantized"),
    )
    path = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(path)
    heads = [name for name in tensors if name.startswith("lm_head.")]
    assert "lm_head.weight_packed" in heads
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in heads},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight_packed is missing"):
        load(tmp_path / "quantized")


def test_a_transformed_head_that_the_body_lacks_is_an_error(checkpoint, tmp_path):
    load(checkpoint[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    transforms = config["quantization_config"]["transform_config"]
    transforms["sha256"] = None
    next(iter(transforms["config_groups"].values()))["apply"][0]["targets"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transform for lm_head, but the model has no Linear"):
        load(tmp_path, AutoModel)


class WithHeads(Qwen2ForCausalLM):
    """A model with numbered parts that the checkpoint does not know"""

    def __init__(self, config):
        super().__init__(config)
        self.heads = ModuleList([Linear(config.hidden_size, 8)])
        self.post_init()


def test_new_parts_may_be_numbered(checkpoint):
    folder, expected = checkpoint
    assert decibels(logits_of(load(folder, WithHeads)), expected) > SAME
