# SPDX-License-Identifier: Apache-2.0
"""Block sizes under a limit of multiply-adds"""

from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import (
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    relative_error,
)

from cat_modifier import CATModifier
from cat_modifier.modifiers.cat import base as modifier_module
from cat_modifier.modifiers.cat import weighted_tokens

WIDE = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}


def transform(folder, max_overhead: float | None, family: str = "llama", **options):
    model = make_model(folder, family, **WIDE)
    before = logits_of(model)
    options = {
        "transform_block_size": 96,
        "precision": torch.float32,
        "max_overhead": max_overhead,
    } | options
    modifier = CATModifier(**options)
    oneshot(model=model, recipe=modifier, dataset=make_loader(make_tokens()))
    assert relative_error(logits_of(model), before) < 1e-4
    return model


def block_sizes(model) -> dict[str, int | None]:
    return {
        args.targets[0]: scheme.block_size for scheme, args in model.transform_config.inputs()
    }


def added(model, layer: str, counts: Mapping[str, int] | None = None) -> float:
    """
    Multiply-adds of the transforms of a layer, relative to those of its Linears

    :param counts: tokens that each Linear sees; None if they see the same
    """
    online = products = 0
    for scheme, args in model.transform_config.inputs():
        name = args.targets[0]
        if name.startswith(layer):
            outer = scheme.online_hadamard_size if scheme.online_hadamard_size > 1 else 0
            cost = model.get_submodule(name).in_features * ((scheme.block_size or 0) + outer)
            online += cost if counts is None else cost * counts[name]
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        if isinstance(module, torch.nn.Linear):
            cost = module.in_features * module.out_features
            products += cost if counts is None else cost * counts.get(name, 0)
    return online / products


@pytest.mark.parametrize("family", ["llama-biases", "cohere"])
@pytest.mark.parametrize("rotation", ["hadamard", "block-hadamard", "none"])
def test_the_budget_is_kept(tmp_path, family, rotation):
    model = transform(tmp_path, 0.12, family, rotation=rotation)
    assert all(0.08 < added(model, f"model.layers.{i}") <= 0.12 for i in (0, 1))


def test_tokens_without_weights_cost_as_much(tmp_path, monkeypatch):
    """Attention weights the tokens of one batch in four, and transforms those of all"""
    monkeypatch.setattr(weighted_tokens, "_ENOUGH_TOKENS", 48)
    model = transform(tmp_path, 0.16)
    # 0.118 if the tokens without weights were left out
    assert all(0.15 < added(model, f"model.layers.{i}") <= 0.16 for i in (0, 1))


def test_bytes_are_limited_as_they_are_stored(tmp_path):
    model = make_model(tmp_path, **WIDE)
    modifier = CATModifier(
        transform_block_size=96,
        precision="int8",
        rotation="block-hadamard",
        max_overhead=0.15,
        overhead_unit="bytes",
    )
    recipe = [modifier, QuantizationModifier(**int_scheme(4, 4))]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    for name in ("model.layers.0", "model.layers.1"):
        # a weight of 4 bits is half a byte, a number of T a whole one
        spent = 2 * added(model, name)
        assert 0.1 < spent <= 0.15


def test_experts_count_with_their_tokens(tmp_path):
    experts = {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 96}
    model = make_model(tmp_path, "qwen3-moe", **WIDE, **experts)
    before, seen = logits_of(model), Counter()
    modifier = CATModifier(transform_block_size=96, precision=torch.float32, max_overhead=0.2)
    data = make_loader(make_tokens())
    oneshot(model=model, recipe=modifier, dataset=data, moe_calibrate_all_experts=False)
    assert relative_error(logits_of(model), before) < 1e-4
    names = {module: name for name, module in model.named_modules()}

    def count(linear, inputs):
        seen[names[linear]] += inputs[0].shape[:-1].numel()

    for module in names:
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    for tokens in make_tokens():
        model(tokens[None])
    assert 0.1 < added(model, "model.layers.0", seen) <= 0.2


def test_more_is_spent_of_a_larger_budget(tmp_path):
    spent = []
    for max_overhead in (0.1, 0.15, 0.2, None):
        model = transform(tmp_path / str(max_overhead), max_overhead)
        spent.append(added(model, "model.layers.1"))
    assert spent == sorted(set(spent))
    largest = block_sizes(model)
    ample = transform(tmp_path / "ample", 10.0)
    assert block_sizes(ample) == largest


def test_layers_in_turn_choose_as_one_pass(tmp_path, monkeypatch):
    both = []
    for resident in (True, False):
        monkeypatch.setattr(modifier_module, "is_resident", lambda model, is_so=resident: is_so)
        both.append(block_sizes(transform(tmp_path / str(resident), 0.2)))
    assert both[0] == both[1]


def test_what_is_not_quantized_costs_least(tmp_path):
    model = make_model(tmp_path, **WIDE)
    recipe = [
        CATModifier(transform_block_size=96, max_overhead=1.0),
        QuantizationModifier(**int_scheme(4, 4) | {"ignore": ["lm_head", "re:.*mlp.*"]}),
    ]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    sizes = block_sizes(model)
    assert sizes["model.layers.0.self_attn.q_proj"] == 96
    assert sizes["model.layers.0.mlp.down_proj"] < 96


def test_unseen_linears_are_rotated(tmp_path):
    model = make_model(tmp_path, **WIDE)
    unused = torch.nn.Linear(192, 192)
    model.model.layers[0].mlp.expert = torch.nn.Sequential(unused)
    before = unused.weight.detach().clone()
    modifier = CATModifier(
        transform_block_size=96,
        max_overhead=0.15,
        rotation="block-hadamard",
        tensor_parallel_size=1,
    )
    oneshot(model=model, recipe=modifier, dataset=make_loader(make_tokens()))
    assert unused.cat_input.weight.shape[-1] == 96
    assert not torch.allclose(unused.weight, before)


def test_layers_in_parts_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(modifier_module, "is_resident", lambda model: False)
    with pytest.raises(ValueError, match="is calibrated in parts"):
        oneshot(
            model=make_model(tmp_path),
            recipe=CATModifier(max_overhead=0.3),
            dataset=make_loader(make_tokens()),
            sequential_targets=["LlamaAttention", "LlamaMLP"],
        )


def test_a_model_without_layers_is_an_error(tmp_path):
    model = make_model(tmp_path)
    model._no_split_modules = None
    with pytest.raises(ValueError, match="does not name its decoding layers"):
        oneshot(
            model=model,
            recipe=CATModifier(max_overhead=0.3),
            dataset=make_loader(make_tokens()),
        )


def test_a_budget_for_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"model.layers.0, more than `max_overhead`, 1.00%"):
        transform(tmp_path, 0.01)
