# SPDX-License-Identifier: Apache-2.0
"""Loading and sharding of input transforms, rank by rank"""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from tiny_models import int_scheme
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from cat_modifier.checkpoint.digest import tensor_digest
from cat_modifier.checkpoint.schema import CATInput, CATScheme, CATTransformConfig
from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.transform import apply_transform
from cat_modifier.integrations.vllm import registry as registry_module
from cat_modifier.integrations.vllm.compat import (
    RoutedExperts,
    WeightsMapper,
    current_platform,
)
from cat_modifier.integrations.vllm.config import CATCompressedTensorsConfig
from cat_modifier.integrations.vllm.expert_inputs import ExpertInputs
from cat_modifier.integrations.vllm.input_transform import InputTransform
from cat_modifier.integrations.vllm.registry import TransformedInput, TransformRegistry

NAME = "layers.0.down_proj.cat_input.weight"


def make_scheme(size=1, interleave=1, **changes) -> CATScheme:
    fields = {
        "type": "cat",
        "apply": [],
        "block_size": 16,
        "online_hadamard_size": size,
        "interleave": interleave,
        "clip_ratio": 1.0,
        "precision": torch.bfloat16,
    }
    return CATScheme(**fields | changes)


def make(hadamard=(1, 1), ranks=1, rank=0, loaded=None, input_size=96, **changes):
    scheme = make_scheme(*hadamard, **changes)
    size = input_size // ranks
    transform = InputTransform(NAME, scheme, input_size, size, rank, torch.float32)
    if loaded is not None:
        transform.load(transform.weight, loaded)
        transform.check_loaded()
    return transform


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("hadamard", [(1, 1), (4, 4), (2, 8)])
def test_shards_put_together_are_the_whole(ranks, hadamard, precision):
    blocks = torch.randn(6, 16, 16).mul(30).to(precision)
    x = torch.randn(5, 96)
    size, interleave = hadamard
    matrix = hadamard_matrix(size) if size > 1 else None
    whole = apply_transform(x, blocks, matrix, interleave)
    parts = [
        make(hadamard, ranks, rank, blocks, precision=precision)(part)
        for rank, part in enumerate(x.chunk(ranks, -1))
    ]
    assert torch.allclose(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-4)
    # each rank has a scale of its own, and so a range of its own to clip
    for rank, part in enumerate(x.chunk(ranks, -1)):
        options = {"clip_ratio": 0.8, "precision": precision}
        clipped = make(hadamard, ranks, rank, blocks, **options)(part)
        low, high = (0.8 * end for end in parts[rank].aminmax(dim=-1, keepdim=True))
        assert torch.allclose(clipped, parts[rank].clamp(low, high), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_hadamard_matrix_alone_has_no_tensor(ranks):
    x = torch.randn(5, 96)
    whole = apply_transform(x, None, hadamard_matrix(2), 16)
    parts = []
    for rank, part in enumerate(x.chunk(ranks, -1)):
        transform = make((2, 16), ranks, rank, block_size=None)
        assert not list(transform.parameters())
        transform.check_loaded()
        parts.append(transform(part))
    assert torch.allclose(torch.cat(parts, -1), whole, atol=1e-6)


def test_tokens_are_clipped_as_in_transformers():
    blocks, x = torch.randn(6, 16, 16).bfloat16(), torch.randn(5, 96)
    expected = apply_transform(x, blocks, clip_ratio=0.7)
    assert torch.allclose(make(loaded=blocks, clip_ratio=0.7)(x), expected, atol=1e-6)
    assert not torch.allclose(make(loaded=blocks)(x), expected, atol=0.1)


@pytest.mark.parametrize("hadamard, ranks", [((12, 8), 2), ((12, 4), 4), ((1, 1), 4)])
def test_shards_which_would_cut_a_transform_are_refused(hadamard, ranks):
    with pytest.raises(ValueError, match=f"tensor_parallel_size={ranks}"):
        make(hadamard, ranks)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.int8], ids=str)
def test_a_tensor_that_was_never_loaded_is_named(precision):
    with pytest.raises(ValueError, match=f"{NAME} is missing"):
        make(precision=precision).check_loaded()


@pytest.mark.parametrize("shape", [(5, 16, 16), (6, 8, 16), (96, 16)])
def test_a_tensor_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=f"{NAME} has shape"):
        make(loaded=torch.ones(shape).bfloat16())


def test_a_tensor_that_is_not_finite_is_named():
    blocks = torch.ones(6, 16, 16).bfloat16()
    blocks[5, 1, 2] = torch.inf
    with pytest.raises(ValueError, match=f"{NAME} .*not finite"):
        make(loaded=blocks)


def test_layers_that_do_not_quantize_hold_int8_as_floats():
    blocks, x = torch.randint(-127, 128, (6, 16, 16)).to(torch.int8), torch.randn(5, 96)
    scheme = make_scheme(precision=torch.int8)
    arguments = (NAME, scheme, 96, 96, 0, torch.float32, None)
    found = []
    for keeps_int8, dtype in ((True, torch.int8), (False, torch.float32)):
        transform = InputTransform(*arguments, keeps_int8)
        with pytest.raises(ValueError, match="is missing"):
            transform.check_loaded()
        transform.load(transform.weight, blocks)
        transform.check_loaded()
        assert transform.weight.dtype == dtype
        found.append(transform(x))
    assert torch.allclose(*found, rtol=1e-6)


def test_weights_that_vllm_makes_up_are_no_missing_ones():
    transform = make(precision=torch.int8)
    initialize_single_dummy_weight(transform.weight)
    transform.check_loaded()


def test_an_integer_that_int8_transforms_do_not_have_is_named():
    blocks = torch.ones(6, 16, 16, dtype=torch.int8)
    blocks[5, 1, 2] = -128
    with pytest.raises(ValueError, match=f"{NAME} .*-128"):
        make(loaded=blocks, precision=torch.int8)


def test_a_tensor_that_is_not_the_one_saved_is_refused():
    blocks = torch.randn(6, 16, 16).bfloat16()
    digest = tensor_digest(blocks)
    transform = InputTransform(NAME, make_scheme(), 96, 96, 0, torch.float32, digest)
    with pytest.raises(ValueError, match=f"{NAME} is not the one that was saved"):
        transform.load(transform.weight, blocks.flip(0))
    with pytest.raises(ValueError, match=f"{NAME} is stored as torch.float32"):
        transform.load(transform.weight, blocks.float())
    transform.load(transform.weight, blocks)
    # a weight reload brings another checkpoint
    transform.load(transform.weight, blocks.flip(0))


def test_a_tensor_under_a_second_part_of_a_merged_layer_is_refused():
    blocks = torch.ones(6, 16, 16).bfloat16()
    transform = make()
    for _ in range(2):  # a reload of weights loads the same part again
        transform.load(transform.weight, blocks, "q")
    with pytest.raises(ValueError, match=f"{NAME} a second time"):
        transform.load(transform.weight, blocks, "k")


def test_blocks_beyond_the_range_of_the_dtype_are_refused():
    transform = InputTransform(NAME, make_scheme(), 96, 96, 0, torch.float16)
    blocks = torch.ones(6, 16, 16).bfloat16()
    transform.load(transform.weight, blocks)
    assert transform.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="beyond the range of torch.float16"):
        transform.load(transform.weight, blocks * 1e5)


def make_registry(*inputs: list[str]) -> TransformRegistry:
    config = CATTransformConfig.empty()
    apply = [CATInput(targets=list(names), location="input") for names in inputs]
    config.config_groups["cat"] = make_scheme(apply=apply)
    return TransformRegistry(config)


def make_config(*inputs: list[str]) -> CATCompressedTensorsConfig:
    config = CATCompressedTensorsConfig({}, [], "pack-quantized")
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    config.registry = make_registry(*inputs)
    return config


def find(config, prefix: str) -> str | None:
    source = config.registry.find(config._parts(torch.nn.Module(), prefix))
    return source and source.first


def test_merged_layers_find_the_transform_of_their_parts():
    config = make_config(["a.q_proj", "a.k_proj", "a.v_proj"], ["a.o_proj"])
    assert find(config, "a.qkv_proj") == "a.q_proj"
    assert find(config, "a.o_proj") == "a.o_proj"
    assert find(config, "b.o_proj") is None


def test_a_linear_that_is_merged_in_the_checkpoint_finds_its_own():
    """GLM-4's gate_up_proj is merged in the checkpoint"""
    assert find(make_config(["a.gate_up_proj"]), "a.gate_up_proj") == "a.gate_up_proj"


@pytest.mark.parametrize(
    "inputs", [[["a.q_proj"], ["a.k_proj", "a.v_proj"]], [["a.q_proj", "a.k_proj"]]]
)
def test_transforms_that_do_not_fit_merged_layers_are_refused(inputs):
    with pytest.raises(ValueError, match="do not share one transform"):
        find(make_config(*inputs), "a.qkv_proj")


def test_an_input_wider_than_a_layer_has_one_transform():
    """In some models attention and MLP read the same input"""
    config = make_config(["a.q_proj", "a.k_proj", "a.v_proj", "a.up_proj"])
    assert find(config, "a.qkv_proj") == find(config, "a.up_proj") == "a.q_proj"


def test_a_linear_that_vllm_makes_without_asking_us_is_refused(monkeypatch):
    monkeypatch.setattr(registry_module, "get_pp_group", lambda: SimpleNamespace(world_size=2))
    registry = make_registry(["a.o_proj", "a.gate"], ["b.o_proj"])
    registry.claim(["a.o_proj"])  # and b is on another rank
    with pytest.raises(NotImplementedError, match="a.gate has an input transform"):
        registry.check_claimed()
    registry.claim(["a.gate"])
    registry.check_claimed()
    monkeypatch.setattr(registry_module, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    with pytest.raises(NotImplementedError, match="b.o_proj has an input transform"):
        registry.check_claimed()


def test_a_mapper_keeps_what_was_claimed(monkeypatch):
    """vLLM maps names again for nested models, when their layers may be made already"""
    monkeypatch.setattr(registry_module, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    config = make_config(["model.a.o_proj"], ["model.b.fc1"], ["vision.c"])
    config.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_prefix={"model.": "language_model.model.", "vision.": None},
            orig_to_new_substr={".fc1.": ".mlp.fc1."},
        )
    )
    assert find(config, "language_model.model.a.o_proj")
    # a rule that ends in a dot matches the names of modules, too
    assert find(config, "language_model.model.b.mlp.fc1")
    config.registry.claim(["language_model.model.a.o_proj"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={".mlp.": ".ffn."}))
    config.registry.claim(["language_model.model.b.ffn.fc1"])
    config.registry.check_claimed()


def test_a_layer_that_vllm_names_otherwise_is_found_in_its_decoder_layer():
    names = [f"layer.0.attention.self.{one}" for one in ("query", "key", "value")]
    registry = make_registry(names, ["layer.1.a.out"], ["layer.2.a.out"], ["layer.2.b.out"])
    parts = [f"layer.0.attention.output.{one}" for one in ("query", "key", "value")]
    assert registry.adopt("layer.0.attention.output.qkv_proj", parts) == names
    assert not registry.adopt("layer.1.attention.output.qkv_proj", parts)
    assert not registry.adopt("layer.2.c.out", ["layer.2.c.out"])  # of two, neither
    registry.claim(names)
    assert not registry.adopt("layer.0.attention.output.qkv_proj", parts)
    with pytest.raises(NotImplementedError, match="two layers that may be this one"):
        registry.claim(names)


def test_experts_may_have_transforms_of_integers_and_of_floats():
    precisions, dtype = (torch.int8, torch.bfloat16), torch.bfloat16
    schemes = [
        make_scheme(precision=one, block_size=s)
        for one, s in zip(precisions, (16, 8), strict=True)
    ]
    names = [f"m.experts.{index}.down_proj" for index in range(2)]
    sources = [
        TransformedInput(s, [name], None) for s, name in zip(schemes, names, strict=True)
    ]
    arguments = (sources, [0, 1], "m.experts", {"w2": "down_proj"}, 96, 96, 0, dtype)
    experts = ExpertInputs(*arguments)
    with pytest.raises(ValueError, match="experts.0.down_proj.* is missing"):
        experts.check_loaded()
    x = torch.randn(5, 96).to(dtype)
    for index, (scheme, precision) in enumerate(zip(schemes, precisions, strict=True)):
        size = scheme.block_size
        blocks = torch.randn(96 // size, size, size).mul(30).to(precision)
        experts.load(experts.weight, blocks, "", "w2", index)
        alone = InputTransform(NAME, scheme, 96, 96, 0, dtype)
        alone.load(alone.weight, blocks)
        expected = alone.quantize(x, 4, False)
        for one, other in zip(experts.quantize(index, x, 4, False), expected, strict=True):
            assert torch.equal(one, other)
    experts.check_loaded()


def make_experts(has_bias: bool) -> RoutedExperts:
    experts = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(experts)
    experts.global_num_experts = 1
    experts.moe_config = SimpleNamespace(has_bias=has_bias)
    for name in ("gate", "up", "down"):
        setattr(experts, f"ckpt_{name}_proj_name", f"{name}_proj")
    return experts


def test_experts_with_biases_are_refused_though_they_have_no_transform():
    with pytest.raises(NotImplementedError, match="use this checkpoint in Transformers"):
        make_config().get_quant_method(make_experts(True), "a.mlp.experts")


def test_experts_of_16_bits_are_refused_but_not_what_stands_beside_them():
    experts = make_experts(False)
    with pytest.raises(NotImplementedError, match="fused experts with input transforms"):
        make_config(["a.mlp.experts.0.up_proj"]).get_quant_method(experts, "a.mlp.experts")
    registry = make_registry(["a.mlp.shared_expert.up_proj"])
    assert not registry.has_below("a.mlp.experts")


def make_experts_config(scheme: dict, *inputs: list[str]) -> CATCompressedTensorsConfig:
    config = CATCompressedTensorsConfig.from_config(
        {"config_groups": {"group_0": scheme}, "format": scheme["format"], "ignore": []}
    )
    config.registry = make_registry(*inputs)
    return config


FLOATS = {
    name: preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
    | {"format": f"{name.lower()}-pack-quantized"}
    for name in ("NVFP4", "MXFP4")
}


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("name", FLOATS)
def test_experts_of_4_bit_floats_are_refused(monkeypatch, name, is_cpu):
    monkeypatch.setattr(current_platform, "is_cpu", lambda: is_cpu)
    experts = "a.mlp.experts"
    config = make_experts_config(FLOATS[name], [f"{experts}.0.up_proj"])
    with pytest.raises(NotImplementedError, match="transforms are served with integers"):
        config.get_quant_method(make_experts(False), experts)
    if is_cpu:  # without transforms as well
        with pytest.raises(NotImplementedError, match="experts: .* floats on a CPU"):
            make_experts_config(FLOATS[name]).get_quant_method(make_experts(False), experts)


def test_experts_of_integers_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    scheme = int_scheme(4, 4)["config_groups"]["group_0"]
    config = make_experts_config(scheme, ["a.mlp.experts.0.up_proj"])
    with pytest.raises(NotImplementedError, match="served on CPUs, not on this .*`ignore`"):
        config.get_quant_method(make_experts(False), "a.mlp.experts")


@pytest.mark.parametrize("input_bits", [4, 8])
def test_integers_that_vllm_would_silently_run_with_16_bit_activations_are_refused(
    input_bits,
):
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32)
    inputs = QuantizationArgs(num_bits=input_bits, type="int", strategy="token", dynamic=True)
    with pytest.raises(NotImplementedError, match="weights of strategy `group`"):
        make_config()._get_scheme_from_parts(weights, inputs, None, "pack-quantized", "a")


@pytest.mark.skipif(not current_platform.is_cpu(), reason="CPUs have no kernel for floats")
@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_floats_are_refused_on_a_cpu(name):
    scheme = preset_name_to_scheme(name, ["Linear"])
    args = scheme.weights, scheme.input_activations, None, scheme.format, "a"
    with pytest.raises(NotImplementedError, match="a: .* floats on a CPU.*recipe w4a4"):
        make_config()._get_scheme_from_parts(*args)
