# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from pydantic import ValidationError

from cat_modifier.checkpoint.schema import (
    CATTransformConfig,
    mark_quantization_config,
    read_quantization_config,
)


def make_config() -> dict:
    transforms = CATTransformConfig.empty()
    transforms.add_group(["layers.0.q", "layers.0.k"], 16, 4, 16, 1.0, torch.bfloat16)
    transforms.add_group(["layers.0.down"], 32, 1, 1, 1.0, torch.bfloat16)
    transforms.add_group(["layers.1.q"], 16, 4, 16, 1.0, torch.bfloat16)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4},
                "format": None,
            },
            "group_1": {
                "targets": ["re:.*down"],
                "weights": {"num_bits": 8},
                "format": "int-quantized",
            },
        },
        "transform_config": transforms.model_dump(mode="json"),
    }


def test_what_is_marked_is_read_back():
    marked = json.loads(json.dumps(mark_quantization_config(make_config())))
    stock, transforms = read_quantization_config(marked)
    assert stock["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert stock["config_groups"]["group_1"]["format"] == "int-quantized"
    assert "transform_config" not in stock
    groups = {
        tuple(args.targets): (scheme.block_size, scheme.online_hadamard_size, scheme.interleave)
        for scheme, args in transforms.inputs()
    }
    assert groups == {
        ("layers.0.q", "layers.0.k"): (16, 4, 16),
        ("layers.0.down",): (32, 1, 1),
        ("layers.1.q",): (16, 4, 16),
    }
    QuantizationConfig.model_validate(stock)


def test_marking_twice_is_marking_once():
    marked = mark_quantization_config(make_config())
    assert mark_quantization_config(marked) == marked


def test_configs_without_transforms_are_left_alone():
    stock = make_config()
    stock["transform_config"] = {}
    assert mark_quantization_config(stock) is stock
    assert read_quantization_config(stock) is None
    assert read_quantization_config(None) is None
    assert read_quantization_config({"quant_method": "gptq", "bits": 4}) is None
    for groups in ([1], "all", {"group_0": None}, {"group_0": {"format": None}}):
        config = {"config_groups": groups, "transform_config": "none"}
        assert read_quantization_config(config) is None


def test_stock_readers_refuse_and_name_the_package():
    marked = mark_quantization_config(make_config())
    with pytest.raises(ValidationError, match="cat-modifier"):
        TransformConfig.model_validate(marked["transform_config"])
    with pytest.raises(ValidationError, match="cat-modifier/pack-quantized"):
        QuantizationConfig.model_validate(marked)


def damage(kind: str) -> dict:
    config = mark_quantization_config(make_config())
    transforms = config["transform_config"]
    scheme = next(iter(transforms["config_groups"].values()))
    if kind == "no transforms":
        config["transform_config"] = {}
    elif kind == "one format not marked":
        config["config_groups"]["group_0"]["format"] = "pack-quantized"
    elif kind == "no groups":
        config["config_groups"] = {}
    elif kind == "later version":
        transforms["version"] = 3
    elif kind == "other type":
        scheme["type"] = "hadamard"
    elif kind == "type from a file":
        scheme["type"] = "/tmp/evil.py:Evil"
    elif kind == "no Hadamard order":
        scheme["hadamard_size"] = 10
    elif kind == "stride that does not divide the blocks":
        scheme["interleave"] = 5
    elif kind == "earlier version":
        transforms["version"] = 1
    elif kind == "negative block":
        scheme["head_dim"] = -1
    elif kind == "target twice":
        scheme["apply"].append(scheme["apply"][0])
    elif kind == "pattern as target":
        scheme["apply"][0]["targets"] = ["re:.*"]
    elif kind == "no targets":
        scheme["apply"][0]["targets"] = []
    elif kind == "other location":
        scheme["apply"][0]["location"] = "output"
    return config


@pytest.mark.parametrize(
    "kind",
    [
        "no transforms",
        "one format not marked",
        "no groups",
        "later version",
        "other type",
    ]
    + ["stride that does not divide the blocks", "earlier version"]
    + ["type from a file", "no Hadamard order", "negative block", "target twice"]
    + ["pattern as target", "no targets", "other location"],
)
def test_damaged_configs_are_errors(kind):
    with pytest.raises(ValueError, match="damaged|cannot be read"):
        read_quantization_config(damage(kind))
