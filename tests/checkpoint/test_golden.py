# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of version 1. Every later release must read it like the first release"""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cat_modifier  # noqa: F401
from cat_modifier.checkpoint import transform_module
from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.transform import apply_transform

GOLDEN = Path(__file__).parent / "golden"


@torch.no_grad()
def sqnr_db() -> float:
    """Compute the SQNR of the checkpoint's log-probabilities, with the golden ones as signal"""
    reference = json.loads((GOLDEN / "reference.json").read_text())
    ids, expected = torch.tensor(reference["ids"]), torch.tensor(reference["logprobs"])
    model = AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32).eval()
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    found = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return 10 * math.log10(expected.var() / (found - expected).var())


def test_it_computes_what_it_did():
    # with another order of summation, a few values round to another integer
    assert sqnr_db() > 30


def test_it_has_all_kinds_of_schemes():
    config = json.loads((GOLDEN / "config.json").read_text())
    transforms = config["quantization_config"]["transform_config"]
    assert transforms["version"] == 1
    assert transforms["fused"]
    kinds = {
        (scheme["block_size"] is None, scheme["online_hadamard_size"], scheme["precision"])
        for scheme in transforms["config_groups"].values()
    }
    assert kinds == {
        (False, 12, "int8"),
        (False, 12, "bfloat16"),
        (False, 1, "float32"),
        (True, 12, "bfloat16"),
    }
    assert all(scheme["clip_ratio"] < 1 for scheme in transforms["config_groups"].values())


def other_hadamard(order: int) -> torch.Tensor:
    return hadamard_matrix(order).roll(1, 0)


def transposed_hadamard(order: int) -> torch.Tensor:
    return hadamard_matrix(order).T


def hadamard_first(x, blocks, hadamard, interleave, clip_ratio):
    x = apply_transform(x, None, hadamard, interleave)
    return apply_transform(x, blocks, None, 1, clip_ratio)


def blocks_in_reverse(x, blocks, hadamard, interleave, clip_ratio):
    blocks = None if blocks is None else blocks.flip(0)
    return apply_transform(x, blocks, hadamard, interleave, clip_ratio)


def neighbours(x, blocks, hadamard, interleave, clip_ratio):
    """Apply the Hadamard matrix to neighbouring channels, which is wrong"""
    if hadamard is not None:
        x = apply_transform(x, blocks)
        return apply_transform(x, None, hadamard, 1, clip_ratio)
    return apply_transform(x, blocks, None, 1, clip_ratio)


def integers_without_a_step(x, blocks, hadamard, interleave, clip_ratio):
    blocks = None if blocks is None else blocks.float()
    return apply_transform(x, blocks, hadamard, interleave, clip_ratio)


def no_clipping(x, blocks, hadamard, interleave, clip_ratio):
    return apply_transform(x, blocks, hadamard, interleave)


@pytest.mark.parametrize(
    "name, other",
    [
        ("hadamard_matrix", other_hadamard),
        ("hadamard_matrix", transposed_hadamard),
        ("apply_transform", hadamard_first),
        ("apply_transform", blocks_in_reverse),
        ("apply_transform", neighbours),
        ("apply_transform", integers_without_a_step),
        ("apply_transform", no_clipping),
    ],
)
def test_another_reading_of_the_format_is_noticed(monkeypatch, name, other):
    assert hasattr(transform_module, name)
    monkeypatch.setattr(transform_module, name, other)
    assert sqnr_db() < 20
