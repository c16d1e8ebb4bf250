# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from tiny_models import (
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    relative_error,
)
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from cat_modifier import CATModifier

LOAD_WITHOUT_US = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def quantize(folder, scheme, cat=True, **model_options):
    model = make_model(folder / "original", **model_options)
    quantization = QuantizationModifier(**scheme)
    oneshot(
        model=model,
        recipe=[CATModifier(transform_block_size=16), quantization] if cat else [quantization],
        dataset=make_loader(make_tokens()),
        output_dir=str(folder / "quantized"),
    )
    return model, folder / "quantized"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return quantize(tmp_path_factory.mktemp("w4a4"), int_scheme(4, 4), family="qwen2")


SCHEMES = {
    "W4A4": int_scheme(4, 4),
    "W4A8": int_scheme(4, 8),
    "W4A16": int_scheme(4, None),
    "W8A8": int_scheme(8, 8, format="int-quantized"),
    "NVFP4": {"scheme": "NVFP4", "ignore": ["lm_head"]},
    "MXFP4": {"scheme": "MXFP4", "ignore": ["lm_head"]},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_model_is_the_one_in_memory(scheme, tmp_path):
    # compressed-tensors decompresses 4-bit floats to bfloat16, whatever the model
    dtype = torch.bfloat16 if "FP4" in scheme else torch.float32
    model, folder = quantize(
        tmp_path, SCHEMES[scheme], family="llama-biases", tied=True, dtype=dtype
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert relative_error(logits_of(loaded), logits_of(model)) < 1e-5


@pytest.mark.parametrize("forward_first", [False, True])
def test_saving_again_and_loading_again(checkpoint, tmp_path, forward_first):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint[1])
    if forward_first:
        logits_of(loaded)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(loaded))
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(checkpoint[1] / "model.safetensors").keys()
    )


def test_transforms_are_stored_once_a_group(checkpoint):
    tensors = load_file(checkpoint[1] / "model.safetensors")
    names = sorted(name for name in tensors if "cat_input" in name)
    layer = [
        f"{name}.cat_input.weight"
        for name in (
            "mlp.down_proj",
            "mlp.gate_proj",
            "self_attn.q_proj",
        )
    ]
    assert names == [f"model.layers.{i}.{name}" for i in range(2) for name in layer]
    assert all(tensors[name].dtype == torch.bfloat16 for name in names)


def test_stock_checkpoints_load_as_without_us(tmp_path):
    _, folder = quantize(tmp_path, int_scheme(4, 4), cat=False)
    script = LOAD_WITHOUT_US + (
        "import torch\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(20)[None])\n"
        "torch.save(logits.logits, sys.argv[2])\n"
    )
    arguments = [str(folder), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(20)[None]).logits
    assert torch.equal(ours, torch.load(tmp_path / "logits.pt"))


@pytest.mark.parametrize("cat", [False, True])
def test_dequantized(tmp_path, cat):
    """The stock config class as an argument, which must suit that of the checkpoint"""
    model, folder = quantize(tmp_path, int_scheme(4, 8), cat=cat)
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert relative_error(logits_of(loaded), logits_of(model)) < 1e-5
    if cat:
        with pytest.raises(ValueError, match="cannot be saved without losing its transforms"):
            loaded.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again" / "config.json").exists()


def test_without_our_package_loading_is_an_error_that_names_it(checkpoint):
    result = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US, str(checkpoint[1])],
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "cat-modifier" in result.stderr.splitlines()[-2] + result.stderr.splitlines()[-3]


def change(folder, target, kind):
    """A copy of a checkpoint with one thing wrong; the name that the error should give"""
    name = "model.layers.1.mlp.down_proj.cat_input.weight"
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        name = "model.layers.1.mlp.up_proj.cat_input.weight"
        tensors[name] = torch.ones(6, 16, 16)
    elif kind == "misshapen":
        tensors[name] = tensors[name][1:].contiguous()
    elif kind == "not finite":
        tensors[name][0, 0, 0] = torch.inf
    elif kind == "renamed layer":
        text = json.dumps(config).replace("layers.1.mlp.down_proj", "layers.7.mlp.down_proj")
        config, name = json.loads(text), "layers.7.mlp.down_proj"
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return name


@pytest.mark.parametrize(
    "kind", ["missing", "extra", "misshapen", "not finite", "renamed layer"]
)
def test_damaged_tensors_are_errors_that_name_them(checkpoint, tmp_path, kind):
    name = change(checkpoint[1], tmp_path / "damaged", kind)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")
