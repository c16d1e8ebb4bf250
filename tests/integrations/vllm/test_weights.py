# SPDX-License-Identifier: Apache-2.0
"""Reload, offload and sharded state of weights, with layers of vLLM"""

import gc
import weakref

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch.nn import Module, Parameter
from vllm.config import (
    LoadConfig,
    OffloadConfig,
    VllmConfig,
    get_current_vllm_config,
    set_current_vllm_config,
)
from vllm.config.offload import UVAOffloadConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
)
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from cat_modifier.checkpoint.schema import CATInput, CATScheme, CATTransformConfig
from cat_modifier.integrations.vllm.compat import QuantizeMethodBase
from cat_modifier.integrations.vllm.config import CATCompressedTensorsConfig
from cat_modifier.integrations.vllm.int8_linear import Int8LinearMethod
from cat_modifier.integrations.vllm.linear import TransformLinearMethod
from cat_modifier.integrations.vllm.registry import TransformRegistry

HIDDEN, HEAD = 64, 16
PARTS = {"q": 4 * HEAD, "k": 2 * HEAD, "v": 2 * HEAD}
LAYER = "model.layers.0.self_attn"


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    with set_current_vllm_config(VllmConfig()):
        file = tmp_path_factory.mktemp("rank") / "store"
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


def make_config(symmetric=False, quantized=("Linear",)) -> CATCompressedTensorsConfig:
    integers = {"num_bits": 4, "type": "int", "symmetric": True}
    group = {
        "targets": list(quantized),
        "weights": integers | {"strategy": "channel"},
        "input_activations": integers
        | {"strategy": "token", "dynamic": True, "symmetric": symmetric},
    }
    config = CATCompressedTensorsConfig.from_config(
        {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": []}
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def make_registry(inputs: list[list[str]], clip_ratio=1.0) -> TransformRegistry:
    """
    :param inputs: names of the Linears that read each input
    """
    transforms = CATTransformConfig.empty()
    transforms.config_groups["cat"] = CATScheme(
        type="cat",
        apply=[CATInput(targets=names, location="input") for names in inputs],
        block_size=16,
        online_hadamard_size=4,
        interleave=16,
        clip_ratio=clip_ratio,
        precision=torch.bfloat16,
    )
    return TransformRegistry(transforms)


class Attention(Module):
    """A merged layer and another layer that read the same input"""

    def __init__(
        self, config: CATCompressedTensorsConfig, gate=f"{LAYER}.gate", dtype=torch.float32
    ):
        super().__init__()
        options = {"params_dtype": dtype, "quant_config": config}
        self.qkv_proj = QKVParallelLinear(
            HIDDEN, HEAD, 4, 2, False, prefix=f"{LAYER}.qkv_proj", **options
        )
        self.gate = ReplicatedLinear(HIDDEN, HIDDEN, False, prefix=gate, **options)

    def forward(self, x):
        return torch.cat([self.qkv_proj(x)[0], self.gate(x)[0]], -1)


def make_model(
    keeps_packed: bool,
    is_quantized: bool,
    gate=f"{LAYER}.gate",
    is_declared=True,
    others=(),
    dtype=torch.float32,
) -> Attention:
    """
    :param is_declared: whether the model says which Linears its merged layer consists of
    :param others: names of more Linears that have a transform
    """
    config = make_config(quantized=("Linear",) if is_quantized else ("re:.*nothing",))
    if not is_declared:
        config.packed_modules_mapping = {}
    names = [f"{LAYER}.{name}_proj" for name in PARTS] + [gate]
    inputs = [names, list(others)] if others else [names]
    config.registry = make_registry(inputs, clip_ratio=0.9 if is_quantized else 1.0)
    vllm_config = get_current_vllm_config()
    vllm_config.additional_config = {"cat_weights": "int4" if keeps_packed else "int8"}
    model = Attention(config, gate, dtype)
    record_metadata_for_reloading(model)
    return model


def load(model: Attention, seed: int, transform_first: bool = True, without=()):
    """
    Load random weights with the weight loaders of parameters, like models of vLLM.

    :param without: name and part of a tensor that is not loaded
    """
    generator = torch.Generator().manual_seed(seed)
    is_quantized = isinstance(model.qkv_proj.quant_method, Int8LinearMethod)
    tensors = []
    for layer, part, rows in (
        *((model.qkv_proj, part, rows) for part, rows in PARTS.items()),
        (model.gate, None, HIDDEN),
    ):
        weight = torch.randint(-8, 8, (rows, HIDDEN), generator=generator).to(torch.int8)
        if is_quantized:
            tensors.append((layer, "weight_packed", pack_to_int32(weight, 4), part))
            scale = torch.rand(rows, 1, generator=generator) + 0.1
            tensors.append((layer, "weight_scale", scale, part))
            tensors.append((layer, "weight_shape", torch.tensor([rows, HIDDEN]), part))
        else:
            tensors.append((layer, "weight", weight.float(), part))
    blocks = torch.randn(4, 16, 16, generator=generator).bfloat16()
    transform = (model.qkv_proj, "cat_input.weight", blocks, "q")
    tensors.insert(0 if transform_first else len(tensors), transform)
    for layer, name, loaded, part in tensors:
        if (name, part) == without:
            continue
        # by name, as vLLM does: a layer may be processed before its last tensor comes
        param = layer.get_parameter(name)
        param.weight_loader(param, loaded, *([] if part is None else [part]))


def process(model: Attention):
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)


def make_loaded(keeps_packed: bool, is_quantized: bool, seed: int) -> Attention:
    model = make_model(keeps_packed, is_quantized)
    load(model, seed)
    process(model)
    return model


X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(9))

KINDS = pytest.mark.parametrize(
    "keeps_packed, is_quantized",
    [(False, True), (True, True), (False, False)],
    ids=["onednn", "packed", "vllm's own method"],
)


def test_the_config_chooses_between_two_methods():
    for is_quantized, method in ((True, Int8LinearMethod), (False, TransformLinearMethod)):
        model = make_model(False, is_quantized)
        assert type(model.qkv_proj.quant_method) is type(model.gate.quant_method) is method
        assert hasattr(model.qkv_proj, "cat_input") and not hasattr(model.gate, "cat_input")


@pytest.mark.parametrize("is_named", [False, True])
def test_a_transformed_lm_head_is_quantized_by_its_name(is_named):
    config = make_config(quantized=("Linear", "re:.*lm_head") if is_named else ("Linear",))
    config.registry = make_registry([["lm_head"]])
    options = {"params_dtype": torch.float32, "quant_config": config, "prefix": "lm_head"}
    if is_named:
        head = ParallelLMHead(500, HIDDEN, **options)
        assert isinstance(head.quant_method, Int8LinearMethod)
        assert head.cat_input.full_shape == (HIDDEN // 16, 16, 16)
        head.cat_input.weight.data.copy_(torch.eye(16))
        head.weight_packed.data.zero_()
        head.weight_scale.data[:500] = 0.1  # the rest is padding
        head.weight_scale.data[3] = torch.nan
        with pytest.raises(ValueError, match="lm_head: `weight_scale`"):
            head.quant_method.process_weights_after_loading(head)
        head.weight_scale.data[3] = 0.1
        head.quant_method.process_weights_after_loading(head)
    else:
        with pytest.raises(NotImplementedError, match="lm_head .* not quantized by its name"):
            ParallelLMHead(500, HIDDEN, **options)


@KINDS
def test_a_merged_layer_that_a_model_does_not_declare(keeps_packed, is_quantized):
    """As those of StableLM and GPT-J, in vLLM"""
    found = []
    for is_declared, seed in ((True, 0), (False, 0), (True, 1)):
        gate = "model.layers.0.mlp.gate"
        model = make_model(keeps_packed, is_quantized, gate, is_declared)
        load(model, seed)
        process(model)
        found.append(model(X))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("keeps_packed", [False, True])
@pytest.mark.parametrize("part", ["q", "v", None])
@pytest.mark.parametrize("name", ["weight_packed", "weight_scale"])
def test_a_tensor_that_the_checkpoint_lacks_is_named(keeps_packed, name, part):
    model = make_model(keeps_packed, True)
    load(model, 0, without=(name, part))
    layer = "gate" if part is None else "qkv_proj"
    with pytest.raises(ValueError, match=f"{LAYER}.{layer}: `{name}`.* is missing"):
        process(model)


@KINDS
def test_vllm_can_let_go_of_the_layers_of_a_model(keeps_packed, is_quantized):
    """By loaders that are methods of the layer: the record for weight reloads is kept"""
    model = make_model(keeps_packed, is_quantized)
    layer = weakref.ref(model.qkv_proj)
    del model
    gc.collect()
    assert layer() is None


@KINDS
@pytest.mark.parametrize("part", ["q", "k", None])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_weight_is_not_cut_to_the_room_that_the_config_leaves(
    keeps_packed, is_quantized, part, dim
):
    model = make_model(keeps_packed, is_quantized)
    layer = model.gate if part is None else model.qkv_proj
    shape = [HIDDEN if part is None else PARTS[part], HIDDEN]
    param = layer.weight_packed if is_quantized else layer.weight
    expected = shape[dim]
    shape[dim] += 8
    weight = torch.zeros(shape, dtype=torch.int8)
    loaded = pack_to_int32(weight, 4) if is_quantized else weight.float()
    with pytest.raises(
        ValueError, match=f"has {expected + 8} .*put channels .* has {expected}: config.json"
    ):
        param.weight_loader(param, loaded, *([] if part is None else [part]))


def test_scales_are_checked_where_vllm_computes():
    model = make_model(False, False)
    load(model, 0)
    model.gate.weight_scale = Parameter(torch.tensor([[0.1], [-0.1]]), requires_grad=False)
    with pytest.raises(ValueError, match="gate: `weight_scale`.* not positive and finite"):
        process(model)


@pytest.mark.parametrize("value", [0.0, -0.1, torch.inf])
def test_scales_that_no_weight_has_are_refused(value):
    model = make_model(False, True)
    load(model, 0)
    model.gate.weight_scale.data[3] = value
    with pytest.raises(ValueError, match="gate: `weight_scale`.* not positive and finite"):
        process(model)


def test_a_merged_layer_whose_parts_cannot_be_told_is_refused():
    others = [f"{LAYER}.{name}" for name in "abc"]
    model = make_model(False, True, is_declared=False, others=others)
    with pytest.raises(NotImplementedError, match="has an input transform, but vLLM"):
        process(model)


@KINDS
@pytest.mark.parametrize("transform_first", [True, False])
def test_reload_computes_with_new_weights_in_the_old_memory(
    keeps_packed, is_quantized, transform_first
):
    """CUDA graphs and compiled graphs read the memory of the first load"""
    expected = [make_loaded(keeps_packed, is_quantized, seed)(X) for seed in (0, 1)]
    assert not torch.allclose(*expected)
    model = make_loaded(keeps_packed, is_quantized, 0)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    memory = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for seed in (1, 0, 1):
        initialize_layerwise_reload(model)
        load(model, seed, transform_first)
        finalize_layerwise_reload(model, None)
        # overwrite memory that vLLM frees: nothing may read it
        _ = [torch.full((n,), 3e38) for n in (64, 128, 4096) for _ in range(50)]
        assert torch.equal(model(X), expected[seed])
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == memory


def test_offloaded_weights_are_read_from_where_vllm_moves_them():
    """vLLM's offloading without unified addresses calls a layer with other tensors"""
    model = make_loaded(True, True, 0)
    before = {name for name, _ in make_model(True, True).named_parameters()}
    expected = model(X)
    moved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    assert not torch.allclose(model(X), expected)
    found = torch.func.functional_call(model, moved, X, tie_weights=False)
    assert torch.equal(found, expected)
    # names that vLLM has offloaded before loading, and offloads again after processing
    for name, tensor in model.named_parameters():
        assert name in before or tensor.numel() <= 2 * HIDDEN * 4, name


def test_offloading_is_refused_where_a_transform_is_in_another_decoder_layer():
    gate = "model.layers.1.self_attn.gate"
    assert make_model(False, True, gate)
    uva = UVAOffloadConfig(cpu_offload_gb=1)
    with set_current_vllm_config(VllmConfig(offload_config=OffloadConfig(uva=uva))):
        assert make_model(False, True)
        with pytest.raises(NotImplementedError, match="cannot be offloaded to the CPU"):
            make_model(False, True, gate)


@pytest.mark.parametrize("load_format", ["sharded_state", "tensorizer"])
def test_processed_weights_are_refused(load_format):
    load_config = LoadConfig(load_format=load_format)
    with set_current_vllm_config(VllmConfig(load_config=load_config)):
        with pytest.raises(NotImplementedError, match=f"--load-format {load_format}"):
            make_model(False, True)


@KINDS
def test_no_tensor_is_hidden_from_vllm(keeps_packed, is_quantized):
    """A linear method holds no tensors besides the parameters of its layer"""
    model = make_loaded(keeps_packed, is_quantized, 0)
    memory = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for layer in (model.qkv_proj, model.gate):
        method = layer.quant_method
        for holder in (method, getattr(method, "kernel", None), layer):
            loose = [
                value for value in vars(holder or object).values() if torch.is_tensor(value)
            ]
            assert all(value.data_ptr() in memory for value in loose)
