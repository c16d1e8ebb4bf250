# SPDX-License-Identifier: Apache-2.0
"""A second run on a model in memory, after one that failed"""

import json
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny_models import int_scheme, make_loader, make_model, make_tokens
from torch.utils.data import DataLoader, Dataset

from cat_modifier import CATModifier
from cat_modifier.modifiers.cat import base as modifier_module

FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}


class Interrupted(Dataset):
    """Data that end with Ctrl-C"""

    def __init__(self, batches: int):
        self.samples = list(make_loader(make_tokens()).dataset)[:batches]

    def __len__(self):
        return 4

    def __getitem__(self, index: int) -> dict:
        if index == len(self.samples):
            raise KeyboardInterrupt
        return self.samples[index]


def quantizer() -> QuantizationModifier:
    return QuantizationModifier(**int_scheme(4, 8))


def of_more() -> QuantizationModifier:
    """Schemes of modules that the right recipe leaves alone"""
    return QuantizationModifier(**int_scheme(8, 8) | {"ignore": []}, kv_cache_scheme=FP8)


def run(model, recipe, data=None, folder=None, **options):
    data = make_loader(make_tokens()) if data is None else data
    folder = None if folder is None else str(folder)
    torch.manual_seed(0)
    oneshot(model=model, recipe=recipe, dataset=data, output_dir=folder, **options)


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(
        folder / "model.safetensors"
    )


FAILURES = {
    "no targets": (lambda: [CATModifier(targets=["re:.*nothing"]), quantizer()], {}),
    "no mapping": (lambda: [CATModifier(mappings=[["re:.*nothing"]]), of_more()], {}),
    "sizes": (lambda: [CATModifier(tensor_parallel_size=5), of_more()], {}),
    "order": (lambda: [of_more(), CATModifier()], {}),
    "quantizer": (
        lambda: [
            CATModifier(),
            QuantizationModifier(targets=["Linear"], scheme="W4A16"),  # groups of 128
        ],
        {},
    ),
    "padding": (
        lambda: [CATModifier(), of_more()],
        {"data": make_loader(make_tokens(), torch.zeros_like(make_tokens()))},
    ),
    "first batch": (lambda: [CATModifier(), of_more()], {"data": DataLoader(Interrupted(0))}),
    "third batch": (lambda: [CATModifier(), of_more()], {"data": DataLoader(Interrupted(2))}),
}


# layer by layer takes longer
@pytest.mark.parametrize(
    "failure, is_resident", [*((name, True) for name in FAILURES), ("third batch", False)]
)
def test_a_run_that_changed_no_weight_leaves_nothing(
    tmp_path, monkeypatch, failure, is_resident
):
    monkeypatch.setattr(modifier_module, "is_resident", lambda model: is_resident)
    model = make_model(tmp_path / "model")
    recipe, options = FAILURES[failure]
    with pytest.raises((ValueError, KeyboardInterrupt)):
        run(model, recipe(), **options)
    run(model, [CATModifier(), quantizer()], folder=tmp_path / "second")

    fresh = make_model(tmp_path / "model")
    run(fresh, [CATModifier(), quantizer()], folder=tmp_path / "fresh")
    (config, tensors), (expected_config, expected) = map(
        read, (tmp_path / "second", tmp_path / "fresh")
    )
    assert config == expected_config
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_a_model_that_is_transformed_in_part_is_refused(tmp_path):
    model = make_model(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.self_attn"):
        run(model, [CATModifier(), quantizer()])
    with pytest.raises(ValueError, match="load the original model again"):
        run(model, [CATModifier(), quantizer()])
