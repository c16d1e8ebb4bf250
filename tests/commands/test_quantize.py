# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier quantize`, and its dry run against real checkpoints"""

import json
import re
import subprocess
import sys

import pytest
import torch
from command_data import make_chat_model
from tiny_models import make_model, make_vision_language_model, make_whisper
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import cat_modifier
from cat_modifier import CATModifier, cli
from cat_modifier.auto_model import auto_class
from cat_modifier.calibration.texts import MIXED, hub_id
from cat_modifier.checkpoint.schema import read_quantization_config
from cat_modifier.hub.run_record import dataset_ids
from cat_modifier.quantize import command as quantize_command
from cat_modifier.quantize.command import calibration_data
from cat_modifier.quantize.outline import Outline, outline, outline_table
from cat_modifier.quantize.skeleton import fill, make_empty

DATA = ("--dataset", "chats.jsonl", "--samples", "8", "--length", "64")


def plan(model, recipe: str) -> Outline:
    return outline(AutoConfig.from_pretrained(model), cat_modifier.recipe(recipe))


def transformed(checkpoint) -> set[str]:
    """Names of the Linears of a checkpoint whose inputs are transformed, online or fused"""
    config = json.loads((checkpoint / "config.json").read_text())
    read = read_quantization_config(config["quantization_config"])
    if read is None:
        return set()
    _, transforms = read
    return {name for _, one in transforms.inputs() for name in one.targets} | {
        *transforms.fused
    }


def check_outline(found: Outline, checkpoint):
    """Compare a dry run with what was made"""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert found.bytes_after == pytest.approx(size, rel=0.02)
    assert {one.name for one in found.linears if one.blocks} == transformed(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    names = {one.name for one in found.linears}
    # routers of experts are no Linears
    assert {one.name for one in found.linears if not one.scheme} == names & {*config["ignore"]}


def test_a_dry_run_says_what_a_run_makes(folder, checkpoint, command):
    found = plan(folder / "model", "w4a4")
    check_outline(found, checkpoint)
    size = (folder / "model" / "model.safetensors").stat().st_size
    assert found.bytes_before == pytest.approx(size, rel=0.02)

    files = sorted(folder.iterdir())
    text = command("quantize", "model", "--recipe", "w4a4", "--dry-run")
    assert sorted(folder.iterdir()) == files
    assert outline_table(found) in text
    (row,) = re.findall(r".*self_attn\.q/k/v_proj.*", text)
    assert row.split()[1:-1] == "self_attn.q/k/v_proj | 6 | 96 | 96 | 96 | W4A4".split()
    assert re.search(r"self_attn\.o_proj .* 24 fused \| +24 \| +W4A4", text)
    assert re.search(r"lm_head .* \|  +\|  +\| +16 ", text)


def test_the_transforms_of_a_dry_run_cost_what_their_sizes_say(folder):
    found = plan(folder / "model", "w4a4")
    # for each layer: q/k/v and gate/up in blocks of 96; o_proj is fused; down in blocks of 48
    added = 96 * 96 + 96 * 96 + 192 * 48
    weights = 96 * (96 + 48 + 48) + 96 * 96 + 96 * 2 * 192 + 192 * 96
    assert found.overhead == pytest.approx(added / weights)
    tensors = 2 * added  # bytes, of int8 in two layers
    assert found.transform_bytes == pytest.approx(tensors, rel=0.05)


@pytest.mark.slow
def test_the_output_is_the_result_and_the_log_is_an_error_stream(folder):
    command = [sys.executable, "-m", "cat_modifier.cli", "quantize", folder / "model"]
    done = subprocess.run(
        [*command, "--recipe", "w4a4", "--dry-run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(re.match(r"\||weights: |transforms: |$", line) for line in lines), lines
    assert lines[0].startswith("| Linears")
    assert " | INFO - " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, recipe, options",
    [
        ("llama-biases", "w4a4_no_transform", {}),
        ("qwen3-moe", "w4a4", {"num_experts": 8, "moe_intermediate_size": 64}),
        ("gemma3", "w8a8", {}),
        ("phi3", "w4a16", {}),
        ("qwen3", "nvfp4", {}),
        ("mamba", "w4a8", {}),
    ],
)
def test_a_dry_run_fits_other_models_and_recipes(
    folder, command, tmp_path, family, recipe, options
):
    make_chat_model(tmp_path / "model", family, **options)
    command(
        *("quantize", tmp_path / "model", "--recipe", recipe, "--output", tmp_path / "made"),
        *DATA,
    )
    check_outline(plan(tmp_path / "model", recipe), tmp_path / "made")


def test_a_dry_run_names_an_upper_bound_of_blocks(folder, tmp_path, command):
    recipe = tmp_path / "limited.yaml"
    text = open(cat_modifier.recipe("w4a4")).read()
    recipe.write_text(
        text.replace("rotation: hadamard", "rotation: block-hadamard\n      max_overhead: 0.2")
    )
    text = command("quantize", "model", "--recipe", recipe, "--dry-run")
    assert "-> at most 0." in text and "at most" in text.splitlines()[-1]


def test_a_model_that_does_not_run_is_an_error(folder):
    config = AutoConfig.from_pretrained(folder / "model")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    config.num_key_value_heads = 3  # does not divide the heads
    message = r"dry run of LlamaForCausalLM is not possible: .*\(RuntimeError: .*must match.*\)"
    with pytest.raises(ValueError, match=message) as caught:
        outline(config, cat_modifier.recipe("w4a4"))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_skeleton_takes_the_memory_of_its_largest_weights(tmp_path):
    make_model(tmp_path, num_hidden_layers=8, vocab_size=4096)
    config = AutoConfig.from_pretrained(tmp_path)
    model = make_empty(config)
    assert all(one.is_meta for one in model.parameters())
    fill(model)
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in model.parameters()
        if one.ndim > 1
    }
    assert sum(one.numel() for one in model.parameters()) > 600_000
    assert sum(storages.values()) < 4 * 900_000
    with torch.no_grad():
        logits = model(torch.arange(2, 18)[None]).logits
    assert logits.isfinite().all()


def test_a_run_ends_with_what_it_made_and_the_next_commands(folder, command, tmp_path):
    output = tmp_path / "made"
    data = (*DATA, "--dataset", folder / "chats.jsonl")
    arguments = ("quantize", folder / "model", "--recipe", "w4a4", "--output", output, *data)
    text = command(*arguments)
    rows = re.findall(r"^\| (\S.*?) +\| +(\d+) \| +(\S+) \| +(\S+) \|$", text, re.MULTILINE)
    kinds = {kind: (count, float(before), float(after)) for kind, count, before, after in rows}
    assert set(kinds) == {"q_proj/k_proj/v_proj", "o_proj", "gate_proj/up_proj", "down_proj"}
    assert all(count == "2" and before < after for count, before, after in kinds.values())
    size = (output / "model.safetensors").stat().st_size
    assert f"-> {size / 1e6:,.1f} MB" in text
    assert f"cat-modifier evaluate {output} --base {folder / 'model'}" in text
    assert f"vllm serve {output}" in text
    assert "is the checkpoint that was saved" in command("verify", output)
    AutoModelForCausalLM.from_pretrained(output)
    line = "cat-modifier quantize model --recipe w4a4 --output made --dataset chats.jsonl"
    card = (output / "README.md").read_text()
    assert f"```bash\n{line} --samples 8 --length 64\n```" in card
    assert str(folder) not in card and str(tmp_path) not in card

    with pytest.raises(SystemExit) as end:
        command(*arguments)
    assert "is not empty" in end.value.code and "--overwrite" in end.value.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["./nope", "--recipe", "w4a4", "--output", "new"], "There is no folder ./nope"),
        (["model", "--recipe", "my.yaml", "--output", "new"], "There is no file my.yaml"),
        (["model", "--recipe", "w3a3", "--output", "new"], "choose one of mxfp4, "),
        (["model", "--recipe", "w4a4"], "name one with --output"),
        (["model", "--recipe", "w4a4", "--output", "chats.jsonl"], "is a file"),
        (["checkpoint", "--recipe", "w4a4", "--output", "new"], "checkpoint is quantized"),
        (["model", "--recipe", "w4a4", "--output", "new", "--column", "x"], "--column"),
    ],
)
def test_misuse_is_one_line(folder, checkpoint, command, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        command("quantize", *arguments, *DATA)
    # misuse that the command line itself notices is written by it
    error = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (folder / "new").exists()


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_work(
    folder, command, monkeypatch
):
    monkeypatch.setattr(quantize_command, "load_model", lambda *args: pytest.fail("too late"))
    with pytest.raises(SystemExit) as end:
        command("quantize", "model", "--recipe", "w4a4", "--output", "/proc/new", *DATA)
    assert "/proc/new" in end.value.code


def test_a_folder_is_no_dataset_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/set") is None


def test_a_missing_library_names_the_extra():
    cli._need("compress", "torch")
    with pytest.raises(ValueError, match=r"pip install 'cat-modifier\[compress\]'"):
        cli._need("compress", "torch", "no_such_library")


@pytest.mark.parametrize(
    "dataset, ids",
    [("org/set", ["org/set"]), ("org/set:part", ["org/set"]), ("a/b.jsonl", []), (MIXED, [])],
)
def test_a_dataset_of_the_hub_keeps_its_id(dataset, ids):
    data = calibration_data(torch.ones(3, 5, dtype=torch.long), dataset)
    assert data[2] == {"input_ids": [1] * 5, "attention_mask": [1] * 5}
    assert dataset_ids(data) == ids


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM", None])
def test_models_that_continue_text_are_known_by_their_config(name):
    config = LlamaConfig(architectures=None if name is None else [name])
    assert auto_class(config) is AutoModelForCausalLM


def test_models_that_do_not_continue_text_are_an_error(tmp_path):
    make_whisper(tmp_path / "speech", 1)
    config = AutoConfig.from_pretrained(tmp_path / "speech")
    with pytest.raises(ValueError, match="is a WhisperForConditionalGeneration, and"):
        auto_class(config)
    make_model(tmp_path / "text")
    config = AutoConfig.from_pretrained(tmp_path / "text")
    config.architectures = ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match="continue text"):
        auto_class(config)


def test_a_dry_run_leaves_the_vision_tower_alone(tmp_path):
    make_vision_language_model(tmp_path)
    found = plan(tmp_path, "w4a4")
    towers = [one for one in found.linears if "visual" in one.name]
    assert towers and not any(one.blocks or one.scheme for one in towers)
    rest = [one for one in found.linears if "language_model" in one.name]
    assert rest and all(one.blocks and one.scheme == "W4A4" for one in rest)


@pytest.mark.slow
def test_a_vision_language_model_keeps_the_files_of_its_processor(tmp_path, command):
    original, made = tmp_path / "model", tmp_path / "made"
    make_vision_language_model(original)
    # tokens below 8 stand for pictures
    (tmp_path / "text.txt").write_text(" ".join(f"<{8 + i * 31 % 120}>" for i in range(600)))
    command(
        *("quantize", original, "--recipe", "w4a8", "--output", made),
        *("--dataset", tmp_path / "text.txt", "--samples", "8", "--length", "64"),
    )
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (made / name).read_bytes() == (original / name).read_bytes()
    names = transformed(made)
    assert names and not any("visual" in name for name in names)
    assert "is the checkpoint that was saved" in command("verify", made)
    # a file that is missing is noticed
    (made / "preprocessor_config.json").unlink()
    with pytest.raises(SystemExit, match="preprocessor_config.json"):
        command("verify", made)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 0.9])
def test_experts_read_their_own_tokens_where_overhead_is_limited(
    folder, tmp_path, command, monkeypatch, limit
):
    model, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    make_chat_model(model, "qwen3-moe", num_experts=8, num_experts_per_tok=2)
    text = open(cat_modifier.recipe("w4a4")).read()
    option = f"rotation: hadamard\n      max_overhead: {limit}"
    recipe.write_text(text.replace("rotation: hadamard", option) if limit else text)
    tokens = []
    start = CATModifier.on_calibration_start

    def watch(self, state, event, **options):
        expert = state.model.model.layers[0].mlp.experts[0].gate_proj
        expert.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[-2]))
        return start(self, state, event, **options)

    monkeypatch.setattr(CATModifier, "on_calibration_start", watch)
    command("quantize", model, "--recipe", recipe, "--output", tmp_path / "made", *DATA)
    assert (min(tokens) < 64) == bool(limit)
