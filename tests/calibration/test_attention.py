# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.modeling.kvcache import QuantizedKVCache
from tiny_models import FAMILIES, make_model, make_tokens
from torch.nn import Linear
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from cat_modifier.calibration.attention import find_value_projections, without_caches


def linears_of(model) -> dict[str, Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name != "lm_head"
    }


def find(model, **linears):
    def run():
        model(make_tokens(1, length=16), use_cache=False)

    return find_value_projections(model, linears or linears_of(model), run)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_found_without_names(tmp_path, family, dtype):
    model = make_model(tmp_path, family, dtype=dtype)
    found = find(model)
    assert set(found) == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    for output, heads in found.items():
        assert heads.linear == output.replace("o_proj", "v_proj")
        assert (heads.head_dim, heads.repeats) == (24, 2)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_which_share_values(tmp_path, heads):
    model = make_model(tmp_path, num_key_value_heads=heads)
    assert {found.repeats for found in find(model).values()} == {4 // heads}


@pytest.mark.parametrize("strength", [0.5, 0.1])
def test_a_gate_on_the_output_is_seen(tmp_path, strength):
    model = make_model(tmp_path)
    gate = torch.linspace(1 - strength, 1 + strength, 96)
    gated = model.model.layers[0].self_attn.o_proj
    gated.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate,), prepend=True)
    assert set(find(model)) == {"model.layers.1.self_attn.o_proj"}


def test_a_norm_of_the_values_is_seen(tmp_path):
    model = make_model(tmp_path)
    values = model.model.layers[1].self_attn.v_proj

    class Norm(torch.nn.Module):  # norms without weights, like in Gemma 4
        def __init__(self):
            super().__init__()
            self.v_proj = values

        def forward(self, x):
            heads = self.v_proj(x).unflatten(-1, (-1, 24))
            return torch.nn.functional.rms_norm(heads, (24,)).flatten(-2)

    linears = linears_of(model)
    model.model.layers[1].self_attn.v_proj = Norm()
    assert set(find(model, **linears)) == {"model.layers.0.self_attn.o_proj"}


def share_values(model, owner: int, reader: int):
    """Let a layer read the values of another, as in models whose later layers compute none"""
    values, seen = model.model.layers[owner].self_attn.v_proj, {}
    values.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))

    class SharedValues(torch.nn.Module):
        def forward(self, hidden_states):
            return values(seen["x"])

    model.model.layers[reader].self_attn.v_proj = SharedValues()


def on_padded(model, mask) -> dict:
    """Find value projections on a text of 40 tokens after much padding"""
    padded = torch.cat([torch.ones(1, 1500, dtype=torch.long), torch.zeros(1, 40).long()], 1)
    padded[:, -40:] = make_tokens(1, length=40)
    attention_mask = (torch.arange(1540) >= 1500).long()[None]

    def run():
        model(padded, attention_mask=attention_mask, use_cache=False)

    is_known = {"mask": attention_mask.bool()} if mask else {}
    return find_value_projections(model, linears_of(model), run, **is_known)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_zeros_of_padding_prove_nothing(mask):
    """Attention returns zeros for them, whatever its Linears do: OPT calls q_proj last"""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
    )
    found = on_padded(OPTForCausalLM(config).eval(), mask)
    assert len(found) == 2
    assert all(one.linear == name.replace("out_proj", "v_proj") for name, one in found.items())


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_a_gate_is_seen_behind_padding(tmp_path, mask):
    model = make_model(tmp_path, max_position_embeddings=2048)
    gate = torch.linspace(0.5, 1.5, 96)
    gated = model.model.layers[0].self_attn.o_proj
    gated.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate,), prepend=True)
    assert set(on_padded(model, mask)) == {"model.layers.1.self_attn.o_proj"}


def test_values_read_elsewhere_are_seen_behind_padding(tmp_path):
    """Padding hides most of what changes"""
    model = make_model(tmp_path, max_position_embeddings=2048)
    share_values(model, 0, 1)
    assert on_padded(model, mask=True) == {}


def test_a_cache_does_not_get_in_the_way(tmp_path):
    model = make_model(tmp_path)

    def run():
        model(make_tokens(1, length=16), use_cache=True)

    assert len(find_value_projections(model, linears_of(model), run)) == 2


def test_values_which_other_layers_read_are_left_alone(tmp_path):
    model = make_model(tmp_path)
    share_values(model, 0, 1)

    def run():
        model(make_tokens(1, length=16), use_cache=False)

    assert find_value_projections(model, linears_of(model), run) == {}


def test_values_are_fused_in_all_layers_but_those_that_others_read(tmp_path):
    model = make_model(tmp_path, num_hidden_layers=8)
    share_values(model, 2, 6)

    def run():
        model(make_tokens(1, length=16), use_cache=False)

    found = find_value_projections(model, linears_of(model), run)
    kept = {f"model.layers.{i}.self_attn.o_proj" for i in range(8) if i not in (2, 6)}
    assert found.keys() == kept


def test_attention_that_cannot_run_again_is_left_alone(tmp_path):
    model = make_model(tmp_path)
    attention = model.model.layers[0].self_attn
    forward, calls = attention.forward, []

    def once(*args, **kwargs):
        if calls:
            raise RuntimeError("a state was used up")
        calls.append(1)
        return forward(*args, **kwargs)

    attention.forward = once

    def run():
        calls.clear()
        model(make_tokens(1, length=16), use_cache=False)

    found = find_value_projections(model, linears_of(model), run)
    assert found.keys() == {"model.layers.1.self_attn.o_proj"}


def test_linears_which_are_not_to_be_changed_are_not_found(tmp_path):
    model = make_model(tmp_path)
    linears = {n: one for n, one in linears_of(model).items() if not n.endswith("v_proj")}
    assert find(model, **linears) == {}


def test_no_hooks_are_left(tmp_path):
    model = make_model(tmp_path)
    find(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_cache_is_filled_twice(tmp_path):
    """Neither Transformers', nor that of llm-compressor, which writes into the former"""
    caches = DynamicCache(), QuantizedKVCache(make_model(tmp_path).config, torch.nn.Identity())
    positional, named = without_caches((1, *caches), {"a": caches[0], "b": caches[1], "c": 2})
    assert positional == (1, None, None) and named == {"a": None, "b": None, "c": 2}
