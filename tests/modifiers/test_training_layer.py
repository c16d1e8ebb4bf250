# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import int_scheme, make_loader, make_model, make_tokens, relative_error

from cat_modifier import CATModifier
from cat_modifier.modifiers.cat_training.fit import Sample, call_layer
from cat_modifier.modifiers.cat_training.inputs import find_inputs
from cat_modifier.modifiers.cat_training.insert import insert
from cat_modifier.modifiers.cat_training.layer import TrainableLayer


@pytest.fixture(params=["llama-biases", "qwen3", "cohere", "block-hadamard", "unfolded", "moe"])
def trainable(request, tmp_path):
    """Make a layer with transforms, and its arguments; nothing is quantized"""
    kind = request.param
    family, options = kind, {}
    overrides = {}
    if kind == "moe":
        family = "qwen3-moe"
        overrides = {"num_experts": 4, "num_experts_per_tok": 2}
    elif kind in ("block-hadamard", "unfolded"):
        family = "llama-biases"
        options = {
            "block-hadamard": {"rotation": "block-hadamard"},
            "unfolded": {"fuse_attention": False},
        }[kind]
    model = make_model(tmp_path, family, **overrides)
    oneshot(
        model=model,
        recipe=[
            CATModifier(transform_block_size=32, precision=torch.float32, **options),
            # no other modules: only transforms are left
            QuantizationModifier(**int_scheme(8, 8) | {"ignore": ["re:.*"]}),
        ],
        dataset=make_loader(make_tokens()),
    )
    name, calls = "model.layers.0", []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(
        lambda layer, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(make_tokens(2), use_cache=False)
    hook.remove()
    args, kwargs = calls[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    sample = Sample(args, kwargs, hidden, hidden, None)
    inputs = [
        one
        for one in find_inputs(model, model.transform_config)
        if one.first.startswith(f"{name}.")
    ]
    return TrainableLayer(layer, name, inputs), sample


def random_corrections(layer: TrainableLayer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: one + 0.3 * torch.randn(one.shape, generator=generator) / one.shape[-1] ** 0.5
        for name, one in layer.identity().items()
    }


@torch.no_grad()
def test_corrections_keep_the_function(trainable):
    layer, sample = trainable
    assert len(layer.identity()) >= 3
    expected = call_layer(layer.layer, sample)
    for corrections in ({}, layer.identity(), random_corrections(layer)):
        with layer.computing_with(layer.correct(corrections)) as module:
            assert relative_error(call_layer(module, sample), expected) < 1e-4


@torch.no_grad()
def test_inserted_corrections_keep_the_function(trainable):
    layer, sample = trainable
    expected = call_layer(layer.layer, sample)
    weights = {
        name: one.weight.clone() for i in layer.inputs for name, one in i.linears.items()
    }
    after = insert(layer, random_corrections(layer))
    for one in layer.inputs:
        for name, linear in one.linears.items():
            assert relative_error(linear.weight, weights[name]) > 0.01
    assert relative_error(call_layer(layer.layer, sample), expected) < 1e-4
    with after.computing_with(after.correct({})) as module:
        assert relative_error(call_layer(module, sample), expected) < 1e-4


def test_modules_come_back_after_an_error(trainable):
    layer, _ = trainable
    before = list(layer.layer.modules())
    with pytest.raises(ZeroDivisionError), layer.computing_with(layer.correct({})):
        raise ZeroDivisionError
    assert list(layer.layer.modules()) == before
