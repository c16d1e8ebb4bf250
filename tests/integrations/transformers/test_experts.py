# SPDX-License-Identifier: Apache-2.0
"""Mixtures, whose fused experts were made Linears when they were compressed"""

import shutil
import subprocess
import sys

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny_models import (
    decibels,
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    replace_tensors,
)
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from cat_modifier import CATModifier
from cat_modifier.integrations.transformers.experts import LinearExperts, linearize_experts

EXPERTS = {
    # each family reads some of the names
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
NARROW = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": NARROW,
    "qwen3_moe": NARROW,
    "olmoe": {},
    "granitemoe": {},
    "gpt_oss": {},
    "deepseek_v2": NARROW | MLA,
    "deepseek_v3": NARROW | MLA,
    "glm4_moe": NARROW,
    "ernie4_5_moe": NARROW | {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "qwen3_next": NARROW | DELTA_NET,
    "lfm2_moe": NARROW | {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": NARROW
    | {"layers_block_type": ["attention", "moe"], "mlp_hidden_act": "relu2"},
}
ROUTERS = ["lm_head", "re:.*router.*", "re:.*gate$"]


def compress(folder, family, cat_ignores=ROUTERS, ignore=ROUTERS):
    """Logits of the model in memory, and its checkpoint"""
    options = EXPERTS | FAMILIES[family]
    model = make_model(folder / "original", model_type=family, **options)
    oneshot(
        model=model,
        recipe=[
            CATModifier(transform_block_size=16, ignore=cat_ignores),
            QuantizationModifier(**int_scheme(4, 4) | {"ignore": ignore}),
        ],
        dataset=make_loader(make_tokens()),
        output_dir=str(folder / "quantized"),
    )
    return logits_of(model), folder / "quantized"


def agreement(folder, expected: Tensor) -> float:
    """Decibels between a checkpoint as loaded and logits"""
    return decibels(logits_of(AutoModelForCausalLM.from_pretrained(folder)), expected)


def change(folder, target, edit):
    """Copy a checkpoint and edit its tensors"""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    replace_tensors(target / "model.safetensors", tensors)
    return target


def exchange_blocks(tensors):
    name = next(name for name in tensors if "experts.0.down_proj.cat_input" in name)
    tensors[name] = tensors[name].flip(0).contiguous()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_read_back(family, tmp_path):
    expected, folder = compress(tmp_path, family)
    assert agreement(folder, expected) > 110
    assert agreement(change(folder, tmp_path / "wrong", exchange_blocks), expected) < 50


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return compress(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("who", ["CATModifier", "both"])
def test_experts_that_are_ignored(family, who, tmp_path):
    without = [*ROUTERS, "re:.*experts.*"]
    ignore = without if who == "both" else ROUTERS
    expected, folder = compress(tmp_path, family, without, ignore)
    assert agreement(folder, expected) > 110
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    assert agreement(tmp_path / "again", expected) > 110


def test_a_reader_needs_no_llm_compressor(mixtral, tmp_path):
    expected, folder = mixtral
    script = (
        "import sys; sys.modules['llmcompressor'] = None\n"
        "import torch, cat_modifier\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n"
    )
    torch.save(make_tokens(2, seed=1), tmp_path / "tokens.pt")
    paths = [str(folder), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    assert decibels(torch.load(tmp_path / "logits.pt"), expected) > 110


EXPERT = "model.layers.1.block_sparse_moe.experts.2.gate_proj"
WRONG = {
    "missing": lambda tensors: tensors.pop(f"{EXPERT}.weight_packed"),
    "older name": lambda tensors: tensors.update(
        {
            f"{EXPERT}.weight_packed".replace("gate_proj", "w1"): tensors.pop(
                f"{EXPERT}.weight_packed"
            )
        }
    ),
    "bias": lambda tensors: tensors.update({f"{EXPERT}.bias": torch.ones(192)}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tensors_of_an_expert_are_errors(kind, mixtral, tmp_path):
    folder = change(mixtral[1], tmp_path / "wrong", WRONG[kind])
    message = "gate_proj.bias has no place" if kind == "bias" else "packed is missing"
    with pytest.raises(ValueError, match=f"experts.2.*{message}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_weight_of_an_expert_that_is_not_quantized_is_an_error(tmp_path):
    without = [*ROUTERS, "re:.*experts.*"]
    _, folder = compress(tmp_path, "mixtral", without, without)
    wrong = change(folder, tmp_path / "wrong", lambda tensors: tensors.pop(f"{EXPERT}.weight"))
    with pytest.raises(ValueError, match=r"experts\.2\.gate_proj\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(wrong)


def test_experts_with_an_unknown_parameter_are_refused(mixtral, monkeypatch):
    original = MixtralExperts.__init__

    def init(self, config):
        original(self, config)
        self.temperature = torch.nn.Parameter(torch.ones(4))

    monkeypatch.setattr(MixtralExperts, "__init__", init)
    with pytest.raises(NotImplementedError, match=r"mlp\.experts cannot be loaded: .*temperat"):
        AutoModelForCausalLM.from_pretrained(mixtral[1])


def test_linear_experts_compute_what_fused_ones_do(tmp_path):
    for family in ("mixtral", "gpt_oss", "nemotron_h"):
        model = make_model(tmp_path / family, model_type=family, **EXPERTS | FAMILIES[family])
        expected = logits_of(model)
        weights = dict(model.named_parameters())
        fused = linearize_experts(model)
        assert sum(isinstance(module, LinearExperts) for module in model.modules()) > 0
        for name in fused:
            _copy(weights[name].detach(), name, model)
        assert decibels(logits_of(model), expected) > 110


def _copy(weight: Tensor, name: str, model):
    """Copy the weights of a projection of all experts"""
    path, _, projection = name.rpartition(".")
    experts = model.get_submodule(path)
    kind = "bias" if projection.endswith("_bias") else "weight"
    projection = projection.removesuffix("_bias")
    if kind == "weight" and experts.is_transposed:
        weight = weight.mT
    parts = {projection: weight}
    if projection == "gate_up_proj":
        half = weight.shape[1] // 2
        gate, up = slice(0, half), slice(half, None)
        if not experts.is_concatenated:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        parts = {"gate_proj": weight[:, gate], "up_proj": weight[:, up]}
    for part, values in parts.items():
        for index, value in enumerate(values):
            linear = experts.get_submodule(f"{index}.{part}")
            getattr(linear, kind).data.copy_(value)
