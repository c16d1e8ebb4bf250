# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import int_scheme, make_loader, make_model, make_tokens
from transformers import AutoModelForCausalLM

from cat_modifier import CATModifier
from cat_modifier.analysis import compare
from cat_modifier.functional.sqnr import measured_sqnr, to_db


def quantize(folder, family, scheme, *modifiers):
    """Quantize a model, and load the checkpoint and the original"""
    original = make_model(folder / "original", family)
    model = make_model(folder / "original", family)
    recipe = [*modifiers, QuantizationModifier(**scheme)]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens(8, 48)))
    model.save_pretrained(folder / "quantized")
    return original, AutoModelForCausalLM.from_pretrained(folder / "quantized")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with biases, quantization groups and transforms"""
    folder = tmp_path_factory.mktemp("compare")
    return quantize(folder, "qwen2", int_scheme(4, 4), CATModifier(transform_block_size=16))


@torch.no_grad()
def test_errors_of_each_linear_are_those_of_its_quantizers(tmp_path):
    original, quantized = quantize(tmp_path, "llama", int_scheme(4, 8))
    tokens = make_tokens(2, 32, seed=3)
    comparison = compare(original, quantized, [tokens])
    layers = comparison.layers.set_index("layer")
    assert set(layers["scheme"]) == {"W4A8"}
    assert len(layers) == 14

    inputs = {}
    name = "model.layers.0.mlp.down_proj"
    linear = original.get_submodule(name)
    linear.register_forward_hook(lambda module, args, output: inputs.update(x=args[0]))
    original(tokens)
    scheme = quantized.get_submodule(name).quantization_scheme
    [expected] = measured_sqnr(
        inputs["x"].flatten(0, 1),
        linear.weight,
        [(scheme.weights, scheme.input_activations)],
    )
    row = layers.loc[name]
    assert row["measured_weights_db"] == pytest.approx(to_db(expected.weights), abs=0.1)
    assert row["measured_db"] == pytest.approx(to_db(expected.joint), abs=0.1)
    assert row["measured_activations_db"] == pytest.approx(to_db(expected.activations), abs=0.3)


@torch.no_grad()
def test_end_to_end_numbers_are_those_of_the_logits(checkpoint):
    original, quantized = checkpoint
    tokens = make_tokens(5, 32, seed=3)
    comparison = compare(original, quantized, tokens.split(2))
    logits = [model(tokens).logits[:, :-1].double() for model in checkpoint]
    labels = tokens[:, 1:].flatten()
    perplexities = [
        torch.nn.functional.cross_entropy(rows.flatten(0, 1), labels).exp().item()
        for rows in logits
    ]
    assert comparison.tokens == labels.numel()
    assert list(comparison.perplexity.values()) == pytest.approx(perplexities, rel=1e-4)
    p, q = (torch.distributions.Categorical(logits=rows) for rows in logits)
    divergence = torch.distributions.kl_divergence(p, q).mean().item()
    assert comparison.kl_divergence == pytest.approx(divergence, rel=1e-3)
    agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item()
    assert comparison.top1_agreement == pytest.approx(agreement)


def test_linears_with_a_transform_fused_between_them_are_left_out(checkpoint, tmp_path):
    options = {"transform_block_size": 16, "fuse_attention": False}
    unfused = quantize(tmp_path, "qwen2", int_scheme(4, 4), CATModifier(**options))
    names = [
        set(compare(*pair, [make_tokens(2)]).layers["layer"]) for pair in (unfused, checkpoint)
    ]
    assert {name.rpartition(".")[2] for name in names[0] - names[1]} == {"v_proj", "o_proj"}


def test_clipping_is_no_error_of_weights(checkpoint, tmp_path):
    options = {"transform_block_size": 16, "clip_activations": False}
    unclipped = quantize(tmp_path, "qwen2", int_scheme(4, 4), CATModifier(**options))
    tables = [
        compare(*pair, [make_tokens(2)]).layers.set_index("layer")
        for pair in (checkpoint, unclipped)
    ]
    errors = [table["measured_weights_db"].to_numpy() for table in tables]
    assert errors[0] == pytest.approx(errors[1], abs=1e-3)
    activations = [table["measured_activations_db"] for table in tables]
    assert activations[0].mean() > activations[1].mean()


def test_errors_accumulate(checkpoint):
    layers = compare(*checkpoint, [make_tokens(4, 32, seed=3)]).layers.set_index("layer")
    # no errors precede the first Linears
    first = layers.loc["model.layers.0.self_attn.q_proj"]
    assert first["accumulated_db"] == pytest.approx(first["measured_db"], abs=1e-3)
    last = layers.loc["model.layers.1.mlp.down_proj"]
    assert last["accumulated_db"] < last["measured_db"] - 3
    assert (layers["measured_db"] > 10).all()


def test_linears_that_saw_nothing_are_named_and_the_others_kept(tmp_path, logs):
    original, quantized = quantize(tmp_path, "llama", int_scheme(4, 8))
    for model in (original, quantized):
        model.model.layers[1].mlp.forward = torch.zeros_like
    layers = compare(original, quantized, [make_tokens(2, 32)]).layers
    assert re.search("3 Linears saw no tokens.*layers.1.mlp", "".join(logs))
    assert len(layers) == 11
    assert layers["measured_db"].max() < 100


def test_models_that_do_not_belong_together_are_an_error(checkpoint, tmp_path):
    original, quantized = checkpoint
    with pytest.raises(ValueError, match="no quantized Linears"):
        compare(original, original, [make_tokens()])
    other = make_model(tmp_path, "qwen2", intermediate_size=96)
    with pytest.raises(ValueError, match="has no counterpart of shape"):
        compare(other, quantized, [make_tokens()])
