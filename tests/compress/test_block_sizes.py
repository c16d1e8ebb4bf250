# SPDX-License-Identifier: Apache-2.0
"""Block sizes under a budget"""

import pytest
import torch
from llmcompressor import oneshot
from tiny_models import logits_of, make_loader, make_model, make_tokens, relative_error

from cat_modifier import CATModifier
from cat_modifier.compress import modifier as modifier_module

WIDE = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}


def transform(folder, budget: float | None, family: str = "llama", **options):
    model = make_model(folder, family, **WIDE)
    before = logits_of(model)
    options = {"block_size": 96, "precision": torch.float32, "budget": budget} | options
    modifier = CATModifier(**options)
    oneshot(model=model, recipe=modifier, dataset=make_loader(make_tokens()))
    assert relative_error(logits_of(model), before) < 1e-4
    return model


def block_sizes(model) -> dict[str, int | None]:
    return {
        args.targets[0]: scheme.head_dim for scheme, args in model.transform_config.groups()
    }


def added(model, layer: str) -> float:
    """Multiply-adds of the transforms of a layer, relative to those of its Linears"""
    online = products = 0
    for scheme, args in model.transform_config.groups():
        linear = model.get_submodule(args.targets[0])
        if args.targets[0].startswith(layer):
            outer = scheme.hadamard_size if scheme.hadamard_size > 1 else 0
            online += linear.in_features * ((scheme.head_dim or 0) + outer)
    for module in model.get_submodule(layer).modules():
        if isinstance(module, torch.nn.Linear):
            products += module.in_features * module.out_features
    return online / products


@pytest.mark.parametrize("family", ["llama-biases", "cohere", "qwen3-moe"])
@pytest.mark.parametrize("rotation", ["hadamard", "block-hadamard", "none"])
def test_the_budget_is_kept(tmp_path, family, rotation):
    model = transform(tmp_path, 0.15, family, rotation=rotation)
    if family != "qwen3-moe":  # in which experts see a part of the tokens
        assert all(0.05 < added(model, f"model.layers.{i}") <= 0.15 for i in (0, 1))
    assert len(set(block_sizes(model).values())) > 1


def test_more_is_spent_of_a_larger_budget(tmp_path):
    spent = []
    for budget in (0.1, 0.15, 0.2, None):
        model = transform(tmp_path / str(budget), budget)
        spent.append(added(model, "model.layers.1"))
    assert spent == sorted(set(spent))
    largest = block_sizes(model)
    ample = transform(tmp_path / "ample", 10.0)
    assert block_sizes(ample) == largest


def test_larger_blocks_go_where_they_help(tmp_path):
    """Weights which look at few directions, that go through all channels, need large blocks"""
    model = make_model(tmp_path, **WIDE)
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(192, 192, generator=generator))[0]
    few = directions * torch.logspace(0, -3, 192) @ directions.T
    for name in "qkv":
        weight = model.get_submodule(f"model.layers.0.self_attn.{name}_proj").weight
        weight.data = weight.data @ few
    modifier = CATModifier(block_size=96, budget=0.18)
    oneshot(model=model, recipe=modifier, dataset=make_loader(make_tokens()))
    sizes = block_sizes(model)
    assert sizes["model.layers.0.self_attn.q_proj"] == 96
    assert sizes["model.layers.1.self_attn.q_proj"] < 96


def test_layers_in_turn_choose_as_one_pass(tmp_path, monkeypatch):
    both = []
    for resident in (True, False):
        monkeypatch.setattr(modifier_module, "is_resident", lambda model, is_so=resident: is_so)
        both.append(block_sizes(transform(tmp_path / str(resident), 0.2)))
    assert both[0] == both[1]


def test_unseen_linears_get_the_smallest(tmp_path):
    model = make_model(tmp_path, **WIDE)
    unused = model.model.layers[0].mlp.spare = torch.nn.Linear(192, 192)
    modifier = CATModifier(block_size=96, budget=0.2)
    oneshot(model=model, recipe=modifier, dataset=make_loader(make_tokens()))
    assert unused.cat_input.weight.shape[-1] == min(
        size for size in block_sizes(model).values() if size
    )


def test_a_budget_for_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"model.layers.0, more than the `budget` of 1.00%"):
        transform(tmp_path, 0.01)
