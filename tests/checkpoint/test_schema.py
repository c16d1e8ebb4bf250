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
from cat_modifier.functional.layout import TransformLayout

DIGEST = "0f" * 32


def make_transforms() -> CATTransformConfig:
    transforms = CATTransformConfig.empty()
    small, large = TransformLayout(16, 16, 4, ""), TransformLayout(32, 1, 1, "")
    bfloat16, float32 = torch.bfloat16, torch.float32
    transforms.add_input(["layers.0.q", "layers.0.k"], small, 1.0, bfloat16)
    transforms.add_input(["layers.0.o"], small, 0.9, None)
    transforms.add_input(["layers.0.down"], large, 1.0, bfloat16)
    transforms.add_input(["layers.1.q"], small, 1.0, bfloat16)
    transforms.add_input(["layers.1.down"], large, 1.0, float32)
    transforms.fused["layers.0.o"] = "layers.0.v"
    for scheme, args in transforms.inputs():
        if scheme.block_size is not None:
            args.sha256 = DIGEST
    return transforms


def make_config() -> dict:
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
        "transform_config": make_transforms().model_dump(),
    }


def test_what_is_marked_is_read_back():
    marked = json.loads(json.dumps(mark_quantization_config(make_config())))
    stock, transforms = read_quantization_config(marked)
    assert stock["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert stock["config_groups"]["group_1"]["format"] == "int-quantized"
    assert "transform_config" not in stock
    QuantizationConfig.model_validate(stock)

    assert transforms == make_transforms()
    sizes = {
        tuple(args.targets): (
            scheme.block_size,
            scheme.online_hadamard_size,
            scheme.interleave,
            scheme.clip_ratio,
            scheme.precision,
        )
        for scheme, args in transforms.inputs()
    }
    assert sizes == {
        ("layers.0.q", "layers.0.k"): (16, 4, 16, 1.0, torch.bfloat16),
        ("layers.0.o",): (None, 4, 16, 0.9, torch.bfloat16),
        ("layers.0.down",): (32, 1, 1, 1.0, torch.bfloat16),
        ("layers.1.q",): (16, 4, 16, 1.0, torch.bfloat16),
        ("layers.1.down",): (32, 1, 1, 1.0, torch.float32),
    }
    assert len(transforms.config_groups) == 4


def test_only_the_fields_of_version_1_are_written():
    """Further fields of compressed-tensors are not part of the format"""
    written = make_transforms().model_dump(mode="json")
    assert written == make_transforms().model_dump()
    assert written.keys() == {"config_groups", "fused", "requires", "version"}
    scheme = written["config_groups"]["cat_16_4_16_1.0_bfloat16"]
    assert scheme == {
        "type": "cat",
        "apply": [
            {"targets": ["layers.0.q", "layers.0.k"], "location": "input", "sha256": DIGEST},
            {"targets": ["layers.1.q"], "location": "input", "sha256": DIGEST},
        ],
        "block_size": 16,
        "online_hadamard_size": 4,
        "interleave": 16,
        "clip_ratio": 1.0,
        "precision": "bfloat16",
    }


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
    with pytest.raises(ValidationError, match="cat-modifier/pack-quantized") as refused:
        QuantizationConfig.model_validate(marked)
    # the first line that a stranger reads, whole
    line = str(refused.value).splitlines()[2]
    assert "input_value='pip install cat-modifier and import cat_modifier'" in line


def test_weights_are_read_without_the_advice_for_other_readers():
    marked = mark_quantization_config(make_config())
    for _ in range(2):  # also where somebody removed it, and vouches for the config
        stock, _ = read_quantization_config(marked)
        assert stock["config_groups"]["group_0"]["weights"] == {"num_bits": 4}
        marked["config_groups"]["group_0"]["weights"] = {"num_bits": 4}
        marked["transform_config"]["sha256"] = None


def test_groups_without_weights_are_marked():
    config = make_config()
    config["config_groups"]["group_0"]["weights"] = None
    marked = mark_quantization_config(config)
    assert marked["config_groups"]["group_0"]["weights"] is None
    stock, _ = read_quantization_config(marked)
    assert stock["config_groups"]["group_0"]["weights"] is None


def refuse(config: dict, *messages: str):
    with pytest.raises(ValueError) as raised:
        read_quantization_config(config)
    for message in messages:
        assert message in str(raised.value)


@pytest.mark.parametrize("kind", ["no transforms", "one format not marked", "no groups"])
def test_transforms_and_marked_formats_come_together(kind):
    config = mark_quantization_config(make_config())
    if kind == "no transforms":
        config["transform_config"] = {}
    elif kind == "one format not marked":
        config["config_groups"]["group_0"]["format"] = "pack-quantized"
    else:
        config["config_groups"] = {}
    refuse(config, "damaged", "`transform_config`")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("version", 2, "reads version 1 of the format, not 2"),
        ("version", "1", "not '1'"),
        ("version", True, "not True"),
        ("requires", "cat-modifier>=99", "pip install 'cat-modifier>=99'"),
        ("requires", "cat-modifier-other", "must name a release of cat-modifier"),
        ("requires", "cat-modifier @ https://example.org/a.whl", "must name a release"),
        ("requires", "cat-modifier >< 1", "not a requirement"),
        ("fused", {"layers.0.o": 1}, "fused"),
        ("config_groups", [], "config_groups"),
        ("other", 1, "other"),
    ],
)
def test_fields_of_the_transform_config(field, value, message):
    config = mark_quantization_config(make_config())
    config["transform_config"][field] = value
    refuse(config, "cannot be read by cat-modifier", message)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("type", "hadamard", "'cat'"),
        ("type", "/some/file.py:Class", "'cat'"),
        ("block_size", 0, "block_size"),
        ("block_size", True, "block_size"),
        ("block_size", 16.0, "block_size"),
        ("block_size", "16", "block_size"),
        ("online_hadamard_size", 10, "10 is no known order"),
        ("online_hadamard_size", None, "online_hadamard_size"),
        ("online_hadamard_size", 1, "`interleave` must be 1"),
        ("interleave", 5, "Blocks of 16 do not hold"),
        ("interleave", -16, "interleave"),
        ("clip_ratio", 0, "clip_ratio"),
        ("clip_ratio", 1.5, "clip_ratio"),
        ("clip_ratio", float("nan"), "clip_ratio"),
        ("clip_ratio", True, "clip_ratio"),
        ("clip_ratio", "0.9", "clip_ratio"),
        ("precision", "int4", "bfloat16, float16, float32, int8, not 'int4'"),
        ("precision", "bool", "not 'bool'"),
        ("precision", "float8_e4m3fn", "not 'float8_e4m3fn'"),
        ("precision", True, "not True"),
        ("precision", 16, "not 16"),
        ("precision", None, "not None"),
        ("head_dim", 16, "`head_dim`"),
        ("randomize", True, "`randomize`"),
        ("other", 1, "other"),
    ],
)
def test_fields_of_a_scheme(field, value, message):
    config = mark_quantization_config(make_config())
    config["transform_config"]["config_groups"]["cat_16_4_16_1.0_bfloat16"][field] = value
    refuse(config, "cannot be read by cat-modifier", message)


def required_fields() -> list[tuple[bool, str]]:
    written = make_transforms().model_dump()
    scheme = next(iter(written["config_groups"].values()))
    # without `requires`, only the formats show that the checkpoint is a CAT checkpoint
    return [(False, name) for name in written if name != "requires"] + [
        (True, name) for name in scheme
    ]


@pytest.mark.parametrize("is_of_scheme, field", required_fields())
def test_every_field_is_required(is_of_scheme, field):
    config = mark_quantization_config(make_config())
    transforms = config["transform_config"]
    scheme = next(iter(transforms["config_groups"].values()))
    del (scheme if is_of_scheme else transforms)[field]
    refuse(config, "cannot be read by cat-modifier", field)


def test_without_requires_the_formats_are_refused():
    config = mark_quantization_config(make_config())
    del config["transform_config"]["requires"]
    refuse(config, "damaged")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": ["layers.1.q"]}, "layers.1.q is targeted by more than one transform"),
        ({"targets": ["re:.*"]}, "by their full names"),
        ({"targets": []}, "by their full names"),
        ({"location": "output"}, "apply to inputs"),
        ({"inverse": True}, "apply to inputs"),
        ({"ignore": ["layers.0.k"]}, "apply to inputs"),
        ({"sha256": "0f"}, "sha256"),
        ({"sha256": DIGEST.upper()}, "sha256"),
        ({"sha256": 15}, "sha256"),
    ],
)
def test_entries_of_a_scheme(change, message):
    config = mark_quantization_config(make_config())
    scheme = config["transform_config"]["config_groups"]["cat_16_4_16_1.0_bfloat16"]
    scheme["apply"][0] |= change
    refuse(config, "cannot be read by cat-modifier", message)


def test_digests_are_those_of_blocks():
    config = mark_quantization_config(make_config())
    groups = config["transform_config"]["config_groups"]
    del groups["cat_16_4_16_1.0_bfloat16"]["apply"][1]["sha256"]
    refuse(config, "has no `sha256` for the transform of layers.1.q")
    config = mark_quantization_config(make_config())
    scheme = config["transform_config"]["config_groups"]["cat_0_4_16_0.9_bfloat16"]
    scheme["apply"][0]["sha256"] = DIGEST
    refuse(config, "`sha256` has no meaning without blocks")
