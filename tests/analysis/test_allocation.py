# SPDX-License-Identifier: Apache-2.0
"""Mixed precision from the report of an analysis"""

import re
import sys

import pandas as pd
import pytest
import yaml
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from tiny_models import make_loader, make_model, make_tokens

from cat_modifier.analysis import analyze
from cat_modifier.analysis.allocation import _patterns, allocate, make_recipe, mean_bits
from cat_modifier.cli import main

SCHEMES = ("W4A4", "W4A8", "W8A8")


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> pd.DataFrame:
    model = make_model(tmp_path_factory.mktemp("model"))
    return analyze(model, [make_tokens()], schemes=SCHEMES, transforms=["none", "cat"])


def noise_of(frame: pd.DataFrame, allocation: dict[str, list[str]]) -> float:
    rows = frame[frame["transform"] == "cat"].set_index(["layer", "scheme"])["measured_db"]
    return sum(
        10 ** (-rows[layer, name] / 10)
        for name, layers in allocation.items()
        for layer in layers
    )


def test_the_budget_is_kept_and_noise_goes_down_with_it(frame):
    noises = []
    for bits in (4, 4.5, 5, 6, 8):
        allocation = allocate(frame, bits)
        assert mean_bits(frame, allocation) <= bits
        layers = [layer for layers in allocation.values() for layer in layers]
        assert sorted(layers) == sorted(frame["layer"].unique())
        noises.append(noise_of(frame, allocation))
    assert all(b < a for a, b in zip(noises, noises[1:], strict=False))
    assert set(allocate(frame, 4)) == {"W4A4"} and set(allocate(frame, 8)) == {"W8A8"}


def test_linears_of_one_input_stay_together(frame):
    for name, layers in allocate(frame, 5).items():
        for layer in layers:
            for a, b in (("q_proj", "k_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj")):
                if layer.endswith(a):
                    assert layer.replace(a, b) in layers, name


def test_a_linear_which_loses_most_comes_first(frame):
    worse = frame.copy()
    worst = "model.layers.1.mlp.down_proj"
    worse.loc[(worse["layer"] == worst) & (worse["scheme"] == "W4A4"), "measured_db"] = -10
    allocation = allocate(worse, 4.9)
    assert worst not in allocation["W4A4"]


def test_patterns_match_these_layers_alone():
    layers = [f"model.layers.{i}.mlp.down_proj" for i in (1, 12)] + ["lm_head"]
    others = [f"model.layers.{i}.mlp.down_proj" for i in (0, 2, 11, 112)]
    others += ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj.x", "alm_head"]
    patterns = [re.compile(pattern.removeprefix("re:")) for pattern in _patterns(layers)]
    assert len(patterns) == 2

    def matches(name):
        return any(pattern.match(name) for pattern in patterns)

    assert all(matches(name) for name in layers)
    assert matches("language_model.model.layers.12.mlp.down_proj")
    assert not any(matches(name) for name in others)


def test_a_model_is_quantized_as_analyzed(tmp_path):
    model = make_model(tmp_path / "model")
    options = {"targets": ["Linear"], "ignore": ["lm_head", "re:.*down_proj"]}
    options["transform_block_size"] = 16
    frame = analyze(
        model, [make_tokens()], SCHEMES, transforms=["none", "cat-block-hadamard"], **options
    )
    allocation = allocate(frame, 5, "cat-block-hadamard")
    assert len(allocation) > 1
    made = make_recipe(allocation, "cat-block-hadamard", **options)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    recipe = str(tmp_path / "recipe.yaml")
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    for name, layers in allocation.items():
        for layer in layers:
            scheme = model.get_submodule(layer).quantization_scheme
            bits = scheme.weights.num_bits, scheme.input_activations.num_bits
            assert "W{}A{}".format(*bits) == name
    names = [name for name, _ in model.named_modules() if name.endswith("cat_input")]
    # nothing is online between v_proj and o_proj
    assert {name.split(".")[-2] for name in names} == {"q_proj", "gate_proj"}
    for layer in model.model.layers:
        assert layer.mlp.gate_proj.cat_input.weight.shape[-1] == 16
        assert not is_module_quantized(layer.mlp.down_proj)


@pytest.mark.parametrize(
    "transform, expected",
    [
        ("hadamard", {"transform_block_size": 1, "alignment_strength": 0.0}),
        ("block-hadamard", {"rotation": "block-hadamard", "alignment_strength": 0.0}),
        ("cat-scaling", {"transform_block_size": 1}),
        ("cat", {}),
        ("cat-eigen-hadamard", {"rotation": "eigen-hadamard"}),
        ("cat-full", {"transform_block_size": "full"}),
    ],
)
def test_recipes_have_the_options_of_their_transform(transform, expected):
    recipe = make_recipe({"W4A4": ["a"]}, transform, ignore=["b"], transform_block_size=64)
    recipe = Recipe.create_instance(yaml.safe_dump(recipe))
    defaults = {"transform_block_size": 64, "rotation": "hadamard", "alignment_strength": 1.0}
    options = recipe.modifiers[0].model_dump()
    assert options | defaults | expected | {"ignore": ["b"]} == options


def test_a_recipe_without_a_transform_has_no_cat_modifier():
    modifiers = make_recipe({"W4A4": ["a"]}, "none")["quant_stage"]["quant_modifiers"]
    assert list(modifiers) == ["QuantizationModifier"]


def test_a_transform_of_others_is_refused():
    with pytest.raises(ValueError, match="CATModifier cannot make the transform 'scaling'"):
        make_recipe({"W4A4": ["a"]}, "scaling")


@pytest.mark.parametrize(
    "bits, transform, message",
    [
        (3.9, "cat", "more than 3.9 bits"),
        (5, "CAT", "no transform 'CAT': choose one of none, cat"),
    ],
)
def test_what_cannot_be_met_is_an_error(frame, bits, transform, message):
    with pytest.raises(ValueError, match=message):
        allocate(frame, bits, transform)


def test_one_scheme_is_too_few(frame):
    with pytest.raises(ValueError, match="needs two schemes of W4A4, W4A8, W8A8: repeat"):
        allocate(frame[frame["scheme"] == "W4A4"], 5)


@pytest.mark.slow
def test_the_command_writes_a_recipe(tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"<{i % 128}>" for i in range(600)))
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> int | str:
        monkeypatch.setattr(sys, "argv", ["cat-modifier", *command.split()])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    analysis = "analyze model --dataset text.txt --samples 4 --length 64 --transforms none,cat"
    ignored = "--ignore lm_head --ignore re:.*k_proj --transform-block-size 24"
    assert run(f"{analysis} {ignored}") == 0
    assert run("allocate report --bits 5 --output new/mixed.yaml") == 0
    printed = capsys.readouterr().out
    assert "new/mixed.yaml" in printed and " of 12 Linears, " in printed
    recipe = (tmp_path / "new/mixed.yaml").read_text()
    modifiers = yaml.safe_load(recipe)["quant_stage"]["quant_modifiers"]
    assert {"w4a4"} < set(modifiers["QuantizationModifier"]["config_groups"])
    assert modifiers["CATModifier"]["transform_block_size"] == 24
    for modifier in modifiers.values():
        assert modifier["ignore"] == ["lm_head", "re:.*k_proj"]

    again = "allocate report --bits 8 --transform none --output new/mixed.yaml"
    assert "mixed.yaml exists" in run(again)
    assert (tmp_path / "new/mixed.yaml").read_text() == recipe
    assert run(f"{again} --overwrite") == 0
    assert "CATModifier" not in (tmp_path / "new/mixed.yaml").read_text()
    assert "nowhere holds no report: make one with `cat-modifier analyze" in run(
        "allocate nowhere"
    )
