# SPDX-License-Identifier: Apache-2.0
"""Mixed precision from the report of an analysis"""

import re
import sys

import pandas as pd
import pytest
import yaml
from llmcompressor import oneshot
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


def test_a_model_is_quantized_as_allocated(frame, tmp_path):
    allocation = allocate(frame, 5)
    assert len(allocation) > 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(allocation)))
    model = make_model(tmp_path / "model")
    recipe = str(tmp_path / "recipe.yaml")
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    for name, layers in allocation.items():
        for layer in layers:
            scheme = model.get_submodule(layer).quantization_scheme
            bits = scheme.weights.num_bits, scheme.input_activations.num_bits
            assert "W{}A{}".format(*bits) == name


@pytest.mark.parametrize(
    "bits, transform, message", [(3.9, "cat", "more than 3.9 bits"), (5, "eigen", "'eigen'")]
)
def test_what_cannot_be_met_is_an_error(frame, bits, transform, message):
    with pytest.raises(ValueError, match=message):
        allocate(frame, bits, transform)


@pytest.mark.slow
def test_the_command_writes_a_recipe(tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"<{i % 128}>" for i in range(600)))
    monkeypatch.chdir(tmp_path)
    analysis = "analyze model --dataset text.txt --samples 4 --length 64 --transforms none,cat"
    for command in (analysis, "allocate report --bits 5 --output mixed.yaml"):
        monkeypatch.setattr(sys, "argv", ["cat-modifier", *command.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
    assert "mixed.yaml" in capsys.readouterr().out
    modifiers = yaml.safe_load((tmp_path / "mixed.yaml").read_text())
    groups = modifiers["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    assert {"w4a4"} < set(groups["config_groups"])

    monkeypatch.setattr(sys, "argv", ["cat-modifier", "allocate", "nowhere"])
    with pytest.raises(SystemExit, match="nowhere"):
        main()
