# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from cat_modifier import CATModifier
from cat_modifier.integrations.transformers import loading

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


@pytest.mark.slow
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
    assert all(tensors[name].dtype == torch.int8 for name in names)


@pytest.mark.slow
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
    """With the stock config class as an argument. It must fit the checkpoint's config"""
    model, folder = quantize(tmp_path, int_scheme(4, 8), cat=cat)
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert relative_error(logits_of(loaded), logits_of(model)) < 1e-5
    if cat:
        with pytest.raises(ValueError, match="cannot be saved without losing its transforms"):
            loaded.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again" / "config.json").exists()


@pytest.mark.slow
def test_without_our_package_loading_is_an_error_that_names_it(checkpoint):
    result = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US, str(checkpoint[1])],
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "cat-modifier" in result.stderr.splitlines()[-2] + result.stderr.splitlines()[-3]


TRANSFORM = "model.layers.1.mlp.down_proj.cat_input.weight"


def change(folder, target, kind) -> str:
    """Copy a checkpoint with one thing wrong; return what the error must name"""
    name = TRANSFORM
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    transforms = config["quantization_config"]["transform_config"]
    if kind == "extra":
        name = "model.layers.1.mlp.up_proj.cat_input.weight"
        tensors[name] = torch.ones(6, 16, 16)
    elif kind == "extra, of a Linear that does not exist":
        name = "model.layers.7.mlp.up_proj.cat_input.weight"
        tensors[name] = torch.ones(6, 16, 16)
    elif kind == "exchanged":
        other, name = name, "model.layers.0.mlp.down_proj.cat_input.weight"
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "no digest":
        name = "has no `sha256`"
        for scheme in transforms["config_groups"].values():
            for entry in scheme["apply"]:
                entry.pop("sha256", None)
    elif kind == "another dtype":
        tensors[name] = tensors[name].to(torch.int16)
    elif kind == "renamed layer":
        transforms["sha256"] = None
        text = json.dumps(config).replace("layers.1.mlp.down_proj", "layers.7.mlp.down_proj")
        config, name = json.loads(text), "layers.7.mlp.down_proj"
    elif kind == "misshapen scale":
        name = "model.layers.0.self_attn.q_proj.weight_scale"
        tensors[name] = tensors[name][1:].contiguous()
    elif kind == "symmetric and clipped":
        name = "The checkpoint clips the input of"
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"]["symmetric"] = True
    elif kind == "not quantized and clipped":
        name = "The checkpoint clips the input of"
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    else:
        raise KeyError(kind)
    if "clipped" in kind:
        transforms["sha256"] = None
        assert any(scheme["clip_ratio"] < 1 for scheme in transforms["config_groups"].values())
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return name


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "extra",
        "extra, of a Linear that does not exist",
        "exchanged",
        "no digest",
        "another dtype",
        "renamed layer",
        "misshapen scale",
        "symmetric and clipped",
        "not quantized and clipped",
    ],
)
def test_damaged_checkpoints_are_errors_that_name_what(
    checkpoint, tmp_path, kind, ignore_mismatched_sizes
):
    name = change(checkpoint[1], tmp_path / "damaged", kind)
    with pytest.raises(ValueError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "damaged", ignore_mismatched_sizes=ignore_mismatched_sizes
        )


def test_all_tensors_that_are_wrong_are_named(checkpoint, tmp_path):
    tensors = load_file(checkpoint[1] / "model.safetensors")
    names = [name for name in tensors if "cat_input" in name]
    for name in names:
        del tensors[name]
    shutil.copytree(checkpoint[1], tmp_path / "damaged")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path / "damaged")
    assert len(names) == 6
    assert all(f"{name} is missing" in str(raised.value) for name in names)


def test_a_state_dict_is_refused(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint[1])
    tensors = load_file(checkpoint[1] / "model.safetensors")
    with pytest.raises(ValueError, match="loaded from files, not from a state_dict"):
        Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


@pytest.mark.parametrize("kind", ["no such method", "not called"])
def test_a_transformers_that_reports_in_another_way_is_an_error(checkpoint, monkeypatch, kind):
    method = loading._REPORT_METHOD
    assert hasattr(PreTrainedModel, method)
    if kind == "no such method":
        monkeypatch.setattr(loading, "_REPORT_METHOD", "_a_name_that_changed")
    else:
        finalize = PreTrainedModel._finalize_model_loading

        def other(model, config, info):
            ours = vars(model).pop(method)
            finalize(model, config, info)
            setattr(model, method, ours)
            return info

        monkeypatch.setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(other))
    with pytest.raises(NotImplementedError, match="would go unnoticed"):
        AutoModelForCausalLM.from_pretrained(checkpoint[1])


def test_the_model_keeps_nothing_of_the_check(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint[1])
    assert loading._REPORT_METHOD not in vars(loaded)
