# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts in real vLLM, held against the compressed model they were saved from"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import serve
from safetensors.torch import load_file
from tiny_models import replace_tensors

TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
THRESHOLD = 40  # dB
"""Two implementations round some integers differently, which moves 8-bit results a little"""

WORST = 0.02
"""Share of a sequence's tokens to leave out: an integer that rounds differently can move a
token, and some of those that read it, to another expert"""


def measure(
    folder: Path, environment: dict | None = None, reload: Path | None = None, **options
) -> tuple[float, str]:
    """
    :return: SQNR of log-probabilities in dB, without the worst tokens, median over sequences,
        and vLLM's log
    """
    data = json.loads((folder / "reference.json").read_text())
    job = {"options": {"dtype": "float32"} | options}
    if reload is not None:
        job["reload"] = str(reload)
    result = serve(folder, data["ids"], environment, **job)
    assert not result["error"], result["log"]
    expected, found = torch.tensor(data["logprobs"]), torch.tensor(result["logprobs"])
    errors = (found - expected).abs().sort(-1).values
    kept = errors[:, : round(errors.shape[1] * (1 - WORST))]
    noise = kept.square().mean(-1).median().clamp_min(1e-12)
    return 10 * math.log10(expected.var() / noise), result["log"]


def change(folder: Path, target: Path, function) -> Path:
    """
    Copy a checkpoint.

    :param function: what changes its tensors
    """
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    function(tensors)
    replace_tensors(target / "model.safetensors", tensors)
    return target


def exchange_blocks(*names: str):
    def function(tensors: dict):
        for name in names:
            blocks = tensors[name]
            tensors[name] = torch.cat([blocks[:2].flip(0), blocks[2:]])

    return function


SERVED = {
    "qwen3-moe-w4a4": "W4A4 integers of experts (activations: 4 bits, per token, asymmetric)",
    # transforms of several sizes in a layer
    "qwen3-moe-w4a4-overhead": "W4A4 integers of experts",
    # a transform for each expert's gate; a shared expert
    "qwen2-moe-w4a8": "W4A8 integers of experts",
    # the shared expert reads the experts' input, transformed
    "qwen2-moe-w4a4": "W4A4 integers of experts",
    "olmoe-w4a8-symmetric": "W4A8 integers of experts (activations: 8 bits, per token, sym",
    "granitemoe-w8a8": "W8A8 integers of experts",
    "glm4-moe-w4a4": "W4A4 integers of experts",
    # other names in the file and in vLLM than in Transformers
    "mixtral-w4a4": "W4A4 integers of experts",
}


@pytest.mark.parametrize("name", SERVED)
def test_logprobs_are_those_of_the_compressed_model(checkpoints, name):
    sqnr, log = measure(checkpoints / name)
    assert sqnr > THRESHOLD, f"{sqnr:.1f} dB"
    assert SERVED[name] in log


@pytest.mark.parametrize("linear", ["0.up_proj", "2.down_proj"])
def test_one_exchanged_block_fails_the_threshold(checkpoints, tmp_path, linear):
    name = f"model.layers.1.mlp.experts.{linear}.cat_input.weight"
    folder = change(
        checkpoints / "qwen3-moe-w4a4", tmp_path / "exchanged", exchange_blocks(name)
    )
    sqnr, _ = measure(folder)
    assert sqnr < THRESHOLD - 10, f"{sqnr:.1f} dB"


def test_compiled(checkpoints):
    sqnr, _ = measure(checkpoints / "qwen2-moe-w4a4", enforce_eager=False)
    assert sqnr > THRESHOLD, f"{sqnr:.1f} dB"


def test_weights_can_stay_packed_and_be_reloaded(checkpoints, tmp_path):
    """Reloaded: at first one transform, one scale and one weight are those of other experts"""
    folder = checkpoints / "qwen3-moe-w4a4-overhead"
    prefix = "model.layers.1.mlp.experts."

    def exchange_experts(tensors: dict):
        for name in ("down_proj.weight_packed", "up_proj.weight_scale"):
            first, second = (f"{prefix}{expert}.{name}" for expert in (0, 1))
            tensors[first], tensors[second] = tensors[second], tensors[first]
        tensors[f"{prefix}2.down_proj.cat_input.weight"].neg_()

    other = change(folder, tmp_path / "other", exchange_experts)
    options = {"additional_config": {"cat_weights": "int4"}}
    sqnr, log = measure(other, **options)
    assert sqnr < THRESHOLD - 10, f"{sqnr:.1f} dB"
    assert "PackedInt4Kernel for W4A4 integers of experts" in log
    sqnr, _ = measure(other, reload=folder, **options)
    assert sqnr > THRESHOLD, f"{sqnr:.1f} dB"


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
def test_two_ranks(checkpoints, tmp_path, expert_parallel):
    """Each rank scales its own part of a row-parallel input: as dense models, less exact"""
    folder = checkpoints / "qwen3-moe-w4a8-tp2"
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    sqnr, _ = measure(folder, TWO_RANKS, **options)
    assert sqnr > 15, f"{sqnr:.1f} dB"
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj.cat_input.weight"
        for layer in range(2)
        for expert in range(4)
    ]
    # as if both ranks took the blocks of the other
    exchanged = change(folder, tmp_path / "exchanged", exchange_blocks(*names))
    worse, _ = measure(exchanged, TWO_RANKS, **options)
    assert worse < 15, f"{worse:.1f} dB"


def test_stock_mixtures_are_served_with_4_bit_activations_if_asked(checkpoints):
    sqnr, log = measure(checkpoints / "stock-moe-w4a4", quantization="cat-modifier")
    assert sqnr > THRESHOLD, f"{sqnr:.1f} dB"
    assert "W4A4 integers of experts (activations: 4 bits" in log


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("qwen3-moe-w4a16", {"dtype": "bfloat16"}, "add 're:.*[.]experts[.].*' to `ignore`"),
        (
            "qwen3-moe-w4a4",
            {"enable_expert_parallel": True, "enable_ep_weight_filter": True},
            "serve without it",
        ),
    ],
    ids=["other schemes", "weight filter"],
)
def test_refusals(checkpoints, name, options, reason):
    result = serve(checkpoints / name, [[3, 4, 5]], options=options)
    assert result["error"]
    assert reason in result["log"]


@pytest.mark.parametrize("kind", ["missing", "extra"])
def test_damaged_tensors_are_errors_that_name_them(checkpoints, tmp_path, kind):
    name = "model.layers.1.mlp.experts.2.down_proj.cat_input.weight"
    extra = "model.layers.1.mlp.experts.2.up_proj"

    def damage(tensors: dict):
        if kind == "missing":
            del tensors[name]
        else:
            tensors[f"{extra}.cat_input.weight"] = tensors[name].clone()

    folder = change(checkpoints / "qwen3-moe-w4a4", tmp_path / "damaged", damage)
    result = serve(folder, [[3, 4, 5]])
    assert result["error"]
    assert (name if kind == "missing" else f"tensor under {extra}") in result["log"]


def test_experts_are_not_cut_to_the_room_that_the_config_leaves(checkpoints, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(checkpoints / "stock-moe-w4a4", folder)
    config = json.loads((folder / "config.json").read_text())
    config["moe_intermediate_size"] //= 2
    (folder / "config.json").write_text(json.dumps(config))
    result = serve(folder, [[3, 4, 5]], options={"quantization": "cat-modifier"})
    assert result["error"]
    assert "config.json is not that of the checkpoint" in result["log"]
