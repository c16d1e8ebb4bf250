# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import CPUCache
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.recipe import Recipe
from tiny_models import (
    FAMILIES,
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    relative_error,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from cat_modifier import CATModifier
from cat_modifier.calibration.second_moments import SecondMoments
from cat_modifier.checkpoint.transform_module import CATTransform
from cat_modifier.modifiers.cat import base as modifier_module
from cat_modifier.modifiers.cat.pipeline import is_resident

ROOT = Path(__file__).parents[2]


LOG_LEVEL = "DEBUG"


def transform(model, *modifiers, tokens=None, mask=None, **options):
    oneshot(
        model=model,
        recipe=list(modifiers),
        dataset=make_loader(make_tokens() if tokens is None else tokens, mask),
        **options,
    )
    return model


def transforms_of(model) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".cat_input"): module.weight
        for name, module in model.named_modules()
        if isinstance(module, CATTransform) and module.weight is not None
    }


# ---- the function of the model is kept -------------------------------------------------

GROUPS = {"cohere": 6}  # two layers of q/k/v/gate/up, o and down

CASES = [
    (family, tied, options)
    for family in FAMILIES
    for tied in (False, True)
    if family != "qwen3-moe"
    for options in (
        {"transform_block_size": 16, "rotation": "hadamard"},
        {"transform_block_size": "full", "rotation": "none"},
        {"transform_block_size": 48, "rotation": "eigen-hadamard"},
        {"transform_block_size": 1, "rotation": "block-hadamard"},
        {"transform_block_size": 32, "rotation": "hadamard", "fuse_attention": False},
    )
]


@pytest.mark.parametrize("family, tied, options", CASES)
def test_function_is_kept(tmp_path, family, tied, options):
    model = make_model(tmp_path, family, tied)
    before = logits_of(model)
    transform(model, CATModifier(**options))
    # the blocks of o_proj are in v_proj
    is_fused = options["transform_block_size"] != "full" and options.get("fuse_attention", True)
    assert len(transforms_of(model)) == GROUPS.get(family, 8) - (2 if is_fused else 0)
    assert relative_error(logits_of(model), before) < 1e-4


@pytest.mark.parametrize("precision", ["int8", "float16", "bfloat16", "float32"])
def test_function_is_kept_at_any_precision_of_the_transform(tmp_path, precision):
    model = make_model(tmp_path)
    before = logits_of(model)
    transform(model, CATModifier(precision=precision))
    assert all(str(t.dtype) == f"torch.{precision}" for t in transforms_of(model).values())
    assert relative_error(logits_of(model), before) < 1e-4


def test_a_transformed_head_is_untied_from_the_embedding(tmp_path):
    model = make_model(tmp_path, tied=True)
    before = logits_of(model)
    transform(model, CATModifier(ignore=[]))
    assert "lm_head" in transforms_of(model)
    assert relative_error(logits_of(model), before) < 1e-4


@pytest.mark.parametrize("tied, ignore", [(False, ["lm_head"]), (True, [])])
def test_offloaded_model(tmp_path, monkeypatch, tied, ignore):
    monkeypatch.setattr(modifier_module, "is_resident", lambda model: False)
    # like on a GPU: each access to an offloaded weight makes a copy
    onload = CPUCache.onload
    monkeypatch.setattr(
        CPUCache,
        "onload",
        lambda self, value: value if value is None else onload(self, value).clone(),
    )
    model = make_model(tmp_path, tied=tied)
    before = logits_of(model)
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            offload_module(module, onload_device="cpu", offload_device="cpu")
    transform(model, CATModifier(ignore=ignore))
    assert relative_error(logits_of(model), before) < 1e-4


# ---- shared inputs and second moments ---------------------------------------------------


def test_groups_are_those_which_read_the_same_input(tmp_path):
    model = transform(make_model(tmp_path), CATModifier(tensor_parallel_size=1))
    groups = {tuple(args.targets) for _, args in model.transform_config.inputs()}
    assert len(groups) == 8
    layer = "model.layers.0"
    assert groups >= {
        tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
        (f"{layer}.self_attn.o_proj",),
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
        (f"{layer}.mlp.down_proj",),
    }


def test_mappings_override_groups(tmp_path):
    model = make_model(tmp_path)
    before = logits_of(model)
    transform(model, CATModifier(mappings=[["re:.*q_proj", "re:.*k_proj"], ["re:.*up_proj"]]))
    groups = {tuple(args.targets) for _, args in model.transform_config.inputs()}
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert (f"{attention}.q_proj", f"{attention}.k_proj") in groups
    assert (f"{attention}.v_proj",) in groups
    assert (f"{mlp}.up_proj",) in groups and (f"{mlp}.gate_proj",) in groups
    assert relative_error(logits_of(model), before) < 1e-4


def test_alignment_that_would_lose_is_left_out(tmp_path, logs):
    errors = {}
    for strength in (0.0, 4.0, 30.0):
        model = make_model(tmp_path / str(strength))
        before = logits_of(model)
        cat = CATModifier(alignment_strength=strength)
        transform(model, cat, QuantizationModifier(**int_scheme(8, 8)))
        errors[strength] = relative_error(logits_of(model), before)
    warnings = [one for one in logs if "rotated without alignment" in one]
    assert len(warnings) == 2 and all("model.layers.0" in one for one in warnings)
    assert max(errors.values()) < 1.2 * errors[0.0], errors


def test_the_advice_after_a_failed_run_is_to_load_the_model_anew(tmp_path):
    model = transform(make_model(tmp_path), CATModifier())
    with pytest.raises(ValueError, match="load the model anew"):
        transform(model, CATModifier())


def test_alike_tokens_are_warned_of(tmp_path, logs):
    transform(make_model(tmp_path / "a"), CATModifier())
    assert not any("so alike" in one for one in logs)
    transform(make_model(tmp_path / "b"), CATModifier(), tokens=make_tokens(1, 48).repeat(4, 1))
    assert any("q_proj: the calibration tokens are so alike" in one for one in logs)


def test_values_keep_their_size(tmp_path):
    """An FP8 KV cache may have no scale but 1"""

    def mean_square(model) -> float:
        found = []
        hook = lambda module, inputs, output: found.append(output.square().mean())  # noqa: E731
        handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(hook)
        logits_of(model)
        handle.remove()
        return found[0].item()

    model = make_model(tmp_path)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(100)
    before = mean_square(model)
    transform(model, CATModifier())
    assert 0.5 < mean_square(model) / before < 2


def test_mappings_of_o_proj_with_another_linear(tmp_path):
    """Values are not fused for a transform that the other Linear needs as well"""
    model = make_model(tmp_path)
    before = logits_of(model)
    transform(model, CATModifier(mappings=[["re:.*o_proj", "re:.*q_proj"]]))
    assert not model.transform_config.fused
    assert relative_error(logits_of(model), before) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("size", [1, 100])
def test_a_quantized_kv_cache(tmp_path, family, size):
    """
    Fused values lose as little to an FP8 cache as the original ones, also if the heads differ
    in size: one scale holds for all heads, but FP8 rounds values of any size alike.
    """
    fp8 = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
    errors = []
    for modifiers in ([CATModifier()], []):
        model = make_model(tmp_path / str(len(modifiers)), family)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight[: layer.self_attn.head_dim].mul_(size)
        before = logits_of(model, make_tokens(8, seed=5))
        cache = QuantizationModifier(kv_cache_scheme=fp8, ignore=["lm_head"])
        transform(model, *modifiers, cache)
        errors.append(relative_error(logits_of(model, make_tokens(8, seed=5)), before))
        assert not modifiers or model.transform_config.fused
    assert 0 < errors[0] < 1.1 * errors[1], errors


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(tmp_path, side):
    tokens = make_tokens(4, 32)
    plain = transform(make_model(tmp_path / "a"), CATModifier(), tokens=tokens)

    padding = torch.full((4, 16), 1)
    real, none = torch.ones_like(tokens), torch.zeros_like(padding)
    order = slice(None, None, -1 if side == "left" else 1)
    padded = torch.cat([tokens, padding][order], 1)
    mask = torch.cat([real, none][order], 1)
    masked = transform(make_model(tmp_path / "b"), CATModifier(), tokens=padded, mask=mask)
    # on the left, other random directions estimate the sensitivity of the tokens
    tolerance = 0.01 if side == "right" else 0.1
    for name, weight in transforms_of(plain).items():
        assert relative_error(transforms_of(masked)[name].float(), weight.float()) < tolerance


def test_each_batch_has_its_own_padding(tmp_path):
    """Also if a part of the model gets no mask, and runs on all batches at once"""
    tokens, mask = make_tokens(4, 48), torch.zeros(4, 48, dtype=torch.long)
    for row, length in enumerate((48, 24, 16, 8)):
        mask[row, :length] = 1
    counts = {}
    original = SecondMoments.reduce

    def reduce(self, device):
        counts[self.shape] = counts.get(self.shape, set()) | {self.count}
        return original(self, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modifier_module, "is_resident", lambda model: False)
        patch.setattr(SecondMoments, "reduce", reduce)
        targets = ["LlamaAttention", "LlamaMLP"]
        options = {"tokens": tokens, "mask": mask, "sequential_targets": targets}
        transform(make_model(tmp_path), CATModifier(), **options)
    assert set.union(*counts.values()) == {96}


@pytest.mark.parametrize("pipeline", ["independent", "single_pass", "basic", "sequential"])
def test_pipelines_agree(tmp_path, pipeline):
    one = transform(make_model(tmp_path / "a"), CATModifier(), pipeline="independent")
    other = transform(make_model(tmp_path / "b"), CATModifier(), pipeline=pipeline)
    for name, weight in transforms_of(one).items():
        assert relative_error(transforms_of(other)[name].float(), weight.float()) < 0.01
    for layers in zip(one.model.layers, other.model.layers, strict=True):
        # these contain the transforms before o_proj
        values = [layer.self_attn.v_proj.weight for layer in layers]
        assert relative_error(*values) < 0.01


def test_values_which_were_computed_already_are_not_transformed(tmp_path, monkeypatch):
    """If v_proj and o_proj run in turn, a change of v_proj would come after its values"""
    expected = transforms_of(transform(make_model(tmp_path / "a"), CATModifier()))
    monkeypatch.setattr(modifier_module, "is_resident", lambda model: False)
    model = make_model(tmp_path / "b")
    before = logits_of(model)
    transform(model, CATModifier(), sequential_targets=["Linear"])
    assert not model.transform_config.fused
    found = transforms_of(model)
    for layer in range(2):  # of q/k/v and gate/up, each has one of its own then
        name = f"model.layers.{layer}.mlp.down_proj"
        assert relative_error(found[name].float(), expected[name].float()) < 0.02
    assert relative_error(logits_of(model), before) < 1e-4


DISTRIBUTED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
from compressed_tensors.distributed import init_dist
from test_cat import *
dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
# ranks with different numbers of tokens
tokens = make_tokens(6)[:4] if rank == 0 else make_tokens(6)[4:]
quantization = QuantizationModifier(**int_scheme(4, 4))
modifier = CATModifier(**json.loads(sys.argv[5]))
transform(model, modifier, quantization, tokens=tokens, output_dir=sys.argv[3])
schemes = [None, None]
dist.all_gather_object(schemes, model.transform_config.model_dump(mode="json"))
assert schemes[0] == schemes[1], schemes
assert any(group["clip_ratio"] < 1 for group in schemes[0]["config_groups"].values())
if rank == 0:
    torch.save(transforms_of(model), sys.argv[4])
dist.barrier()
dist.destroy_process_group()  # or its threads may abort the process at its end
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_overhead": 0.2}])
def test_ranks_sum_their_second_moments(tmp_path, options):
    model = make_model(tmp_path / "model")
    transform(model, CATModifier(**options), tokens=make_tokens(6))
    script = tmp_path / "run.py"
    script.write_text(
        DISTRIBUTED.replace(
            "from test_cat",
            "from transformers import AutoModelForCausalLM\nfrom test_cat",
        )
    )
    arguments = [str(Path(__file__).parent), str(tmp_path / "model")]
    arguments += [str(tmp_path / "quantized"), str(tmp_path / "transforms.pt")]
    arguments.append(json.dumps(options))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), *arguments]
    subprocess.run(command, env=environment, check=True, timeout=300)
    distributed = torch.load(tmp_path / "transforms.pt", weights_only=False)
    for name, weight in transforms_of(model).items():
        if weight.shape == distributed[name].shape or not options:
            # ranks draw other directions to estimate how much attention feels each token
            assert relative_error(distributed[name].float(), weight.float()) < 0.05
    assert (tmp_path / "quantized" / "config.json").exists()


# ---- layout ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        # q/k/v, gate/up and o_proj have 96 inputs, the last in heads of 24; down_proj has 192
        ({"transform_block_size": 128}, {(96, 1, 1), (96, 2, 96), (None, 4, 24)}),
        ({"transform_block_size": 64}, {(48, 2, 48), (64, 12, 16), (None, 4, 24)}),
        ({"transform_block_size": 64, "fuse_attention": False}, {(48, 2, 48), (64, 12, 16)}),
        ({"transform_block_size": 1}, {(12, 8, 12), (16, 12, 16), (None, 4, 24)}),
        ({"transform_block_size": "full"}, {(96, 1, 1), (192, 1, 1)}),
        ({"transform_block_size": 40, "rotation": "block-hadamard"}, {(32, 1, 1)}),
        ({"transform_block_size": 40, "rotation": "none"}, {(32, 1, 1)}),
        # o_proj and down_proj are divided
        ({"tensor_parallel_size": 2}, {(96, 1, 1), (None, 2, 24)}),
        # 4 ranks of one head
        ({"tensor_parallel_size": "auto"}, {(96, 1, 1), (48, 1, 1)}),
    ],
)
def test_blocks_and_hadamard_matrices_fit_the_inputs(tmp_path, options, expected):
    options = {"tensor_parallel_size": 1} | options
    model = transform(make_model(tmp_path), CATModifier(**options))
    schemes = model.transform_config.config_groups.values()
    found = {
        (scheme.block_size, scheme.online_hadamard_size, scheme.interleave)
        for scheme in schemes
    }
    assert found == expected


@pytest.mark.parametrize(
    "overrides, group_size, expected",
    [
        ({}, None, 4),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}, None, 2),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}, None, 1),
        # ranks share KV heads
        ({"num_key_value_heads": 1}, None, 4),
        ({"intermediate_size": 168}, None, 1),
        ({}, 48, 2),
    ],
)
def test_tensor_parallel_size_is_the_largest_that_fits(
    tmp_path, overrides, group_size, expected
):
    """The result equals that of the same `tensor_parallel_size`, given as an option"""
    configs = []
    for size in ("auto", expected):
        scheme = int_scheme(4, None)
        if group_size is not None:
            args = scheme["config_groups"]["group_0"]["weights"]
            args |= {"strategy": "group", "group_size": group_size}
        recipe = [CATModifier(tensor_parallel_size=size), QuantizationModifier(**scheme)]
        model = make_model(tmp_path / str(size), **overrides)
        oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens(2)))
        groups = model.transform_config.config_groups
        configs.append([(x.block_size, x.hadamard_size, x.apply) for x in groups.values()])
    assert configs[0] == configs[1]


def test_row_parallel_inputs_alone_are_divided(tmp_path):
    options = {"transform_block_size": 1, "tensor_parallel_size": 4}
    model = transform(make_model(tmp_path), CATModifier(**options))
    spans = {
        args.targets[0].rpartition(".")[2]: scheme.hadamard_size
        for scheme, args in model.transform_config.inputs()
    }
    # of o_proj's heads each is on its own
    assert spans == {"q_proj": 96, "gate_proj": 96, "down_proj": 48}


def test_inputs_of_experts_are_whole_on_each_rank(tmp_path):
    options = {"transform_block_size": 1, "tensor_parallel_size": 4}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 192}
    model = transform(make_model(tmp_path, "qwen3-moe", **experts), CATModifier(**options))
    spans = {
        args.targets[0].rpartition("experts.")[2]: scheme.hadamard_size
        for scheme, args in model.transform_config.inputs()
    }
    assert spans["0.up_proj"] == 96 and spans["0.down_proj"] == 48


# ---- composition -------------------------------------------------------------------------


def test_gptq_sees_transformed_inputs(tmp_path, monkeypatch):
    seen = {}
    original = GPTQModifier.calibrate_module

    def calibrate(self, module, args, output):
        seen.setdefault(self._module_names[module], []).append(args[0].clone())
        return original(self, module, args, output)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", calibrate)
    plain = make_model(tmp_path / "a")
    inputs = []
    plain.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].clone())
    )
    logits_of(plain, make_tokens()[:1])

    model = make_model(tmp_path / "b")
    transform(model, CATModifier(), GPTQModifier(**int_scheme(4, 4)))
    q_proj = model.model.layers[0].self_attn.q_proj
    expected = q_proj.cat_input(inputs[0], is_clipped=False)
    assert relative_error(seen["model.layers.0.self_attn.q_proj"][0], expected) < 1e-5


def test_cat_is_better_than_hadamard_and_gptq_better_than_rounding(tmp_path):
    reference = logits_of(make_model(tmp_path / "r"))
    recipes = {
        "plain": [QuantizationModifier(**int_scheme(4, 4))],
        "hadamard": [
            CATModifier(alignment_strength=0.0, clip_activations=False),
            QuantizationModifier(**int_scheme(4, 4)),
        ],
        "cat": [CATModifier(), QuantizationModifier(**int_scheme(4, 4))],
        "cat, gptq": [CATModifier(), GPTQModifier(**int_scheme(4, 4))],
    }
    sqnr = {}
    for name, recipe in recipes.items():
        model = transform(make_model(tmp_path / name), *recipe, tokens=make_tokens(32))
        sqnr[name] = (
            -20 * torch.log10(torch.tensor(relative_error(logits_of(model), reference))).item()
        )
    assert sqnr["hadamard"] > sqnr["plain"], sqnr
    assert sqnr["cat"] > sqnr["hadamard"] + 2, sqnr
    assert sqnr["cat, gptq"] > sqnr["cat"], sqnr


def test_after_smoothquant(tmp_path):
    model = make_model(tmp_path)
    before = logits_of(model)
    mappings = [
        [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
        [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
    ]
    transform(model, SmoothQuantModifier(mappings=mappings), CATModifier())
    assert relative_error(logits_of(model), before) < 1e-4


def test_smoothquant_after_cat_is_refused(tmp_path):
    mappings = [[["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"]]
    with pytest.raises(ValueError, match="put it before CATModifier"):
        transform(make_model(tmp_path), CATModifier(), SmoothQuantModifier(mappings=mappings))


def test_quantization_before_cat_is_refused(tmp_path):
    with pytest.raises(ValueError, match="put CATModifier before"):
        transform(
            make_model(tmp_path),
            QuantizationModifier(**int_scheme(4, 4)),
            CATModifier(),
        )


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_a_shared_pass_is_refused(tmp_path, pipeline):
    modifiers = CATModifier(), GPTQModifier(**int_scheme(4, 4))
    with pytest.raises(ValueError, match="cannot share a calibration pass with GPTQModifier"):
        transform(make_model(tmp_path), *modifiers, pipeline=pipeline)


SPINQUANT = {"rotations": ["R1", "R4"], "transform_type": "random-hadamard"}


@pytest.mark.parametrize(
    "modifiers, message",
    [
        (lambda: [SpinQuantModifier(**SPINQUANT), CATModifier()], "has online transforms"),
        (lambda: [CATModifier(), SpinQuantModifier(rotations=["R2"])], "put it before CATMod"),
    ],
)
def test_transforms_of_other_modifiers_are_refused(tmp_path, modifiers, message):
    model = make_model(tmp_path, hidden_size=128, head_dim=32, intermediate_size=256)
    with pytest.raises(ValueError, match=message):
        transform(model, *modifiers())


def test_folded_transforms_of_other_modifiers_compose(tmp_path):
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    rotations = ["R1", "R2"]  # these change the function: they center the embedding
    before = logits_of(
        transform(make_model(tmp_path / "a", **sizes), SpinQuantModifier(rotations=rotations))
    )
    model = make_model(tmp_path / "b", **sizes)
    transform(model, SpinQuantModifier(rotations=rotations), CATModifier())
    assert relative_error(logits_of(model), before) < 1e-4
    assert model.transform_config.requires.startswith("cat-modifier")


def test_experts_of_a_mixture(tmp_path):
    """The gates of all experts share an input; each down projection has its own"""
    model = make_model(
        tmp_path,
        "qwen3-moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    before = logits_of(model)
    transform(model, CATModifier())
    groups = [args.targets for _, args in model.transform_config.inputs()]
    gates = next(group for group in groups if "model.layers.0.mlp.experts.0.gate_proj" in group)
    assert sum(name.startswith("model.layers.0.mlp.experts") for name in gates) == 8
    assert sum("down_proj" in group[0] for group in groups) == 2 * 4
    assert relative_error(logits_of(model), before) < 1e-4


def test_two_transforms_of_one_input_are_refused(tmp_path):
    model = transform(make_model(tmp_path), CATModifier())
    with pytest.raises(ValueError, match="has a transform already"):
        transform(model, CATModifier())


def test_two_modifiers_with_different_targets_make_one_checkpoint(tmp_path):
    """Blocks of 16 for attention, 48 for the MLP"""
    model = make_model(tmp_path / "model")
    recipe = [
        CATModifier(targets=["re:.*self_attn.*_proj"], transform_block_size=16),
        CATModifier(targets=["re:.*mlp.*_proj"], transform_block_size=48),
        QuantizationModifier(**int_scheme(4, 4)),
    ]
    transform(model, *recipe, output_dir=str(tmp_path / "out"))
    sizes = {
        args.targets[0].rpartition(".")[2]: scheme.block_size
        for scheme, args in model.transform_config.inputs()
    }
    assert sizes["q_proj"] == 16 and sizes["gate_proj"] == sizes["down_proj"] == 48
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(transforms_of(loaded)) == 6
    assert relative_error(logits_of(loaded), logits_of(model)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_run(tmp_path, recipe):
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    oneshot(
        model=model,
        recipe=str(recipe),
        dataset=make_loader(make_tokens()),
        output_dir=str(tmp_path / "out"),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    formats = [
        group["format"] for group in config["quantization_config"]["config_groups"].values()
    ]
    is_cat = "no_transform" not in recipe.stem
    assert all(str(name).startswith("cat-modifier/") == is_cat for name in formats)
    # llm-compressor cannot read back recipes of its own GPTQModifier
    if "GPTQModifier" not in recipe.read_text():
        saved = Recipe.create_instance(str(tmp_path / "out" / "recipe.yaml")).modifiers
        assert isinstance(saved[0], CATModifier) == is_cat


# ---- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocksize": 3}, "blocksize"),
        ({"transform_block_size": 0}, "transform_block_size"),
        ({"transform_block_size": -4}, "transform_block_size"),
        ({"transform_block_size": "half"}, "transform_block_size"),
        ({"rotation": "random"}, "rotation"),
        ({"alignment_strength": float("nan")}, "alignment_strength"),
        ({"dampening_frac": 0}, "dampening_frac"),
        ({"precision": "int4"}, "precision"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": "all"}, "tensor_parallel_size"),
    ],
)
def test_unusable_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        CATModifier(**options)


def test_no_targets_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found no modules for targets"):
        transform(make_model(tmp_path), CATModifier(targets=["re:.*nothing"]))


def test_targets_that_are_all_ignored_are_an_error_with_what_to_do(tmp_path):
    message = "all 15 targets are ignored, for example .*Set `ignore` of CATModifier"
    with pytest.raises(ValueError, match=message):
        transform(make_model(tmp_path), CATModifier(ignore=["re:.*layers.*", "lm_head"]))


def test_targets_that_are_no_linears_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="embed_tokens is a Embedding"):
        transform(make_model(tmp_path), CATModifier(targets=["re:.*embed_tokens"]))


def test_inputs_that_cannot_be_divided_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot be divided among tensor_parallel_size=5"):
        transform(make_model(tmp_path), CATModifier(tensor_parallel_size=5))


def test_mappings_that_match_nothing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="No modules match the mapping"):
        transform(make_model(tmp_path), CATModifier(mappings=[["re:.*nothing"]]))


def test_nothing_but_padding_is_an_error(tmp_path):
    tokens = make_tokens()
    with pytest.raises(ValueError, match="saw no tokens"):
        oneshot(
            model=make_model(tmp_path),
            recipe=CATModifier(),
            dataset=make_loader(tokens, torch.zeros_like(tokens)),
        )


@pytest.mark.parametrize("seed", range(3))
def test_data_which_is_shuffled_anew_for_each_pass(tmp_path, seed):
    """oneshot shuffles by default; here with samples of several lengths"""
    model = make_model(tmp_path)
    before = logits_of(model)
    samples = [tokens[: 16 + index].tolist() for index, tokens in enumerate(make_tokens(32))]
    torch.manual_seed(seed)  # the order of the data
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        recipe=CATModifier(),
        dataset=Dataset.from_dict({"input_ids": samples}),
        num_calibration_samples=32,
    )
    assert len(model.transform_config.fused) == 2
    assert relative_error(logits_of(model), before) < 1e-4


def test_layers_in_turn_give_the_transforms_of_one_pass(tmp_path, monkeypatch, logs):
    """Models that do not fit on the device run layer by layer"""
    both = []
    for resident in (True, False):
        monkeypatch.setattr(modifier_module, "is_resident", lambda model, is_so=resident: is_so)
        model = transform(make_model(tmp_path / str(resident)), CATModifier())
        both.append(model.state_dict())
    for name, tensor in both[0].items():
        # not equal: the sequential pipeline computes attention in another way
        assert relative_error(tensor.float(), both[1][name].float()) < 0.01
    pipelines = [line for line in logs if "Inferred" in line]
    assert "SinglePassPipeline" in pipelines[0] and "SequentialPipeline" in pipelines[1]


def test_second_moments_larger_than_the_model_use_the_sequential_pipeline(tmp_path, logs):
    options = {"hidden_size": 384, "head_dim": 96, "intermediate_size": 96}
    for block_size, pipeline in ((16, "SinglePass"), ("full", "Sequential")):
        model = make_model(tmp_path / pipeline, **options)
        transform(model, CATModifier(transform_block_size=block_size))
        assert f"{pipeline}Pipeline" in next(line for line in logs if "Inferred" in line)
        logs.clear()


def test_a_model_that_is_offloaded_is_not_resident(tmp_path):
    model = make_model(tmp_path)
    assert is_resident(model)
    offload_module(model.model.layers[0].mlp.up_proj, "cpu", "disk", offload_dir=str(tmp_path))
    assert not is_resident(model)


def test_nan_activations_are_an_error_that_names_the_layer(tmp_path):
    model = make_model(tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.self_attn"):
        transform(model, CATModifier(), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    # weights of layer 0 are transformed, and its config is not complete
    with pytest.raises(ValueError, match="A modifier did not finish"):
        model.save_pretrained(tmp_path / "out")


def test_few_tokens_are_a_warning_and_keep_the_function(tmp_path, logs):
    model = make_model(tmp_path)
    before = logits_of(model)
    transform(model, CATModifier(), tokens=make_tokens(1, 5))
    assert any("5 calibration tokens are too few" in message for message in logs)
    assert relative_error(logits_of(model), before) < 1e-4


@pytest.mark.parametrize("name", ["o_proj", "up_proj"])
def test_zero_weights_keep_the_function(tmp_path, name):
    model = make_model(tmp_path)
    with torch.no_grad():
        for full_name, parameter in model.named_parameters():
            if name in full_name:
                parameter.zero_()
    before = logits_of(model)
    transform(model, CATModifier())
    assert relative_error(logits_of(model), before) < 1e-4


def test_a_forgotten_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="pass a `dataset` to oneshot"):
        oneshot(model=make_model(tmp_path), recipe=[CATModifier()])


def test_integers_that_vllm_cannot_serve_are_a_warning(tmp_path, logs):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    quantization = QuantizationModifier(**int_scheme(4, 4, weights=weights))
    transform(make_model(tmp_path), CATModifier(), quantization)
    assert sum("vLLM may not serve them" in message for message in logs) == 1


def test_four_bit_weights_take_four_bits_in_files(tmp_path):
    model = make_model(tmp_path / "model")
    quantization = QuantizationModifier(**int_scheme(4, 4, format=None))
    transform(model, CATModifier(), quantization, output_dir=str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == "cat-modifier/pack-quantized"


def test_weights_that_do_not_fill_32_bits_are_not_packed(tmp_path):
    """vLLM cannot split a packed integer that holds weights of two rows"""
    model = make_model(tmp_path / "model")
    quantization = QuantizationModifier(**int_scheme(6, 6, format=None))
    transform(model, CATModifier(), quantization, output_dir=str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == "cat-modifier/int-quantized"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(logits_of(reloaded), logits_of(model)) < 1e-5


def test_an_empty_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="calibration dataset is empty"):
        transform(make_model(tmp_path), CATModifier(), tokens=make_tokens(0))


def test_mapped_linears_without_tokens_stay_together(tmp_path):
    model = make_model(tmp_path)
    unused = {"a": torch.nn.Linear(96, 8), "b": torch.nn.Linear(96, 8)}
    model.model.layers[0].expert = torch.nn.ModuleDict(unused)
    transform(model, CATModifier(mappings=[["re:.*expert.a$", "re:.*expert.b$"]]))
    groups = [args.targets for _, args in model.transform_config.inputs()]
    assert ["model.layers.0.expert.a", "model.layers.0.expert.b"] in groups


def test_linears_without_tokens_are_rotated(tmp_path, logs):
    """An expert that no token is routed to"""
    model = make_model(tmp_path)
    unused = torch.nn.Linear(96, 96)
    model.model.layers[0].expert = torch.nn.Sequential(unused)
    weight = unused.weight.detach().clone()
    transform(model, CATModifier(tensor_parallel_size=1))
    assert any("layers.0.expert.0" in message for message in logs)
    x = torch.randn(3, 96)
    expected = torch.nn.functional.linear(x, weight, unused.bias)
    assert relative_error(unused(x), expected) < 1e-5
    rotation = unused.cat_input.weight[0].float()
    product = rotation @ rotation.T
    assert torch.equal(product, product[0, 0] * torch.eye(96))


def test_saving_without_quantization_is_refused(tmp_path):
    model = transform(make_model(tmp_path), CATModifier())
    with pytest.raises(ValueError, match="nothing is quantized"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_log_tells_what_each_transform_did(tmp_path, logs):
    transform(make_model(tmp_path), CATModifier(), QuantizationModifier(**int_scheme(4, 8)))
    lines = [line for line in logs if "predicted W4A8 SQNR" in line]
    assert len(lines) == 8
    for word in (
        "q_proj/k_proj/v_proj",
        "alignment",
        "condition number",
        "block size 96",
    ):
        assert any(word in line for line in lines)
    assert any("blocks of 128 do not divide 96 inputs" in line for line in logs)


def test_log_does_not_predict_what_is_not_quantized(tmp_path, logs):
    scheme = int_scheme(8, 8, targets=["re:.*mlp.*"])
    transform(make_model(tmp_path), CATModifier(), QuantizationModifier(**scheme))
    lines = [line for line in logs if "condition number" in line]
    assert len(lines) == 8
    for line in lines:
        assert ("predicted W8A8 SQNR" in line) == ("mlp" in line)
        assert ("not quantized" in line) == ("self_attn" in line)


def test_a_recipe_that_does_not_quantize_is_a_warning(tmp_path, logs):
    transform(make_model(tmp_path), CATModifier())
    assert any("Nothing in the recipe quantizes" in line for line in logs)
    logs.clear()
    transform(make_model(tmp_path), CATModifier(), QuantizationModifier(**int_scheme(4, 4)))
    assert not any("Nothing in the recipe quantizes" in line for line in logs)


@pytest.mark.parametrize(
    "targets, is_quantized, is_named",
    [
        (["Linear"], False, False),
        (["Linear"], True, False),
        (["Linear", "lm_head"], True, True),
    ],
    ids=["ignored", "not named", "named"],
)
@pytest.mark.parametrize("transformed", [True, False])
def test_an_lm_head_that_vllm_cannot_serve_is_a_warning(
    tmp_path, logs, targets, is_quantized, is_named, transformed
):
    scheme = int_scheme(4, 4)
    scheme["config_groups"]["group_0"]["targets"] = targets
    if is_quantized:
        scheme["ignore"] = []
    options = {"ignore": []} if transformed else {}
    transform(make_model(tmp_path), CATModifier(**options), QuantizationModifier(**scheme))
    is_warned = (is_quantized or transformed) and not is_named
    assert any("a quantized or transformed lm_head only if" in x for x in logs) == is_warned


def test_other_recipes_without_modifiers_have_the_pipeline_of_llm_compressor():
    assert CalibrationPipeline._infer_pipeline([]) == "datafree"


def test_block_scales_which_do_not_divide_a_weight_are_no_hindrance(tmp_path):
    """Predictions for the log must not fail where quantization works"""
    model = make_model(tmp_path)
    quantization = QuantizationModifier(scheme="FP8_BLOCK", ignore=["lm_head"])
    recipe = [CATModifier(transform_block_size=16), quantization]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    assert any(isinstance(module, CATTransform) for module in model.modules())
