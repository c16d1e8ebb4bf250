# SPDX-License-Identifier: Apache-2.0
"""Models that use the weight of a Linear without calling the Linear"""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import (
    int_scheme,
    make_loader,
    make_model,
    make_tokens,
    make_whisper,
    relative_error,
)
from torch.nn.functional import linear
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    JambaConfig,
    MambaConfig,
    MBartConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from cat_modifier import CATModifier
from cat_modifier.modifiers.cat import base
from cat_modifier.modifiers.cat.function_check import FunctionCheck, relative_change

PIPELINES = ["independent", "sequential"]


def make(folder, kind: type, config: PreTrainedConfig):
    torch.manual_seed(0)
    make_model(folder)  # for its tokenizer
    kind.from_config(config).save_pretrained(folder)
    return kind.from_pretrained(folder).eval()


def transform(model, folder, pipeline="independent", seed=0, ignore=None, **sample):
    options = {} if ignore is None else {"ignore": ignore}
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        recipe=CATModifier(transform_block_size=16, **options),
        dataset=DataLoader([sample] * 2, batch_size=1),
        pipeline=pipeline,
    )


def outputs_of(model, **sample) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model(**{name: one[None] for name, one in sample.items()}, use_cache=False)
    return [one for one in outputs.to_tuple() if isinstance(one, torch.Tensor)]


def check_is_kept(before, after):
    errors = [relative_error(*pair) for pair in zip(after, before, strict=True)]
    assert max(errors) < 1e-5


TEXT = {"input_ids": make_tokens(1)[0], "attention_mask": torch.ones(48, dtype=torch.long)}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}


def mamba():
    return AutoModelForCausalLM, MambaConfig(**SMALL, state_size=8), "dt_proj"


def jamba():
    config = JambaConfig(
        **SMALL,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=16,
        use_mamba_kernels=False,
        pad_token_id=1,
    )
    return AutoModelForCausalLM, config, "dt_proj"


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("family", [mamba, jamba])
def test_weights_read_without_a_call_are_left_alone(tmp_path, logs, family, pipeline):
    kind, config, name = family()
    model = make(tmp_path, kind, config)
    before = outputs_of(model, **TEXT)
    transform(model, tmp_path, pipeline, ignore=["re:.*lm_head"], **TEXT)
    check_is_kept(before, outputs_of(model, **TEXT))
    assert any("were not called" in line and name in line for line in logs)
    assert not any(name in one for one in _transformed(model))


def test_attention_of_torch_is_left_alone(tmp_path, logs):
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = make(tmp_path, AutoModel, config)
    picture = {"pixel_values": torch.randn(3, 32, 32)}
    before = outputs_of_picture(model, picture)
    transform(model, tmp_path, ignore=[], **picture)
    check_is_kept(before, outputs_of_picture(model, picture))
    assert any("head.attention.out_proj" in line for line in logs)
    assert any("mlp.fc1" in one for one in _transformed(model))


def outputs_of_picture(model, picture):
    with torch.no_grad():
        outputs = model(pixel_values=picture["pixel_values"][None])
    return [outputs.last_hidden_state, outputs.pooler_output]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_weights_read_beside_a_call_are_an_error(tmp_path, pipeline):
    model = make_model(tmp_path)
    mlp = model.model.layers[1].mlp

    class Reader(type(mlp)):
        def forward(self, x):
            called = super().forward(x)
            return called + linear(called, self.up_proj.weight)[..., :96]

    mlp.__class__ = Reader
    with pytest.raises(
        ValueError, match=r"model\.layers\.1 changes by .*layers\.1\.mlp\.up_proj"
    ):
        transform(model, tmp_path, pipeline, **TEXT)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_attention_to_an_encoder(tmp_path, logs, pipeline):
    """All decoder layers read the output of the encoder"""
    model = make_whisper(tmp_path, decoder_layers=3)
    sample = {"input_features": torch.randn(8, 40), "decoder_input_ids": TEXT["input_ids"]}
    before = outputs_of(model, **sample)
    transform(model, tmp_path, pipeline, **sample)
    check_is_kept(before, outputs_of(model, **sample))
    assert not logs_of_unseen(logs)
    assert {f"model.decoder.layers.{i}.encoder_attn.k_proj" for i in range(3)} <= _transformed(
        model
    )


@pytest.mark.parametrize("resident", [True, False])
def test_quantization_stays_disabled_while_inputs_are_collected(
    tmp_path, monkeypatch, resident
):
    monkeypatch.setattr(base, "is_resident", lambda model: resident)
    models = []
    for recipe in ([], [QuantizationModifier(**int_scheme(4, 4))]):
        model = make_model(tmp_path)
        oneshot(
            model=model,
            recipe=[CATModifier(), *recipe],
            dataset=make_loader(make_tokens()),
            pipeline="independent",
        )
        models.append(model)
    for name, tensor in models[0].state_dict().items():
        if name.endswith("cat_input.weight"):
            assert torch.equal(tensor, models[1].state_dict()[name])


def test_logits_with_a_bias_are_no_hindrance(tmp_path):
    """As of MBart and Marian, which add it to the output of the lm_head"""
    config = MBartConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        vocab_size=128,
        max_position_embeddings=64,
    )
    model = make(tmp_path, AutoModelForSeq2SeqLM, config)
    sample = TEXT | {"decoder_input_ids": TEXT["input_ids"]}
    before = outputs_of(model, **sample)
    transform(model, tmp_path, **sample)
    check_is_kept(before, outputs_of(model, **sample))


def logs_of_unseen(logs):
    return [line for line in logs if "saw no calibration" in line or "were not called" in line]


def _transformed(model) -> set[str]:
    config = model.transform_config
    return {name for _, args in config.inputs() for name in args.targets} | config.fused.keys()


def test_conv1d_is_named(tmp_path):
    config = GPT2Config(
        n_embd=64, n_head=4, n_layer=2, vocab_size=128, bos_token_id=0, eos_token_id=1
    )
    model = make(tmp_path, AutoModelForCausalLM, config)
    with pytest.raises(ValueError, match=r"Conv1D modules \(transformer\.h\.0\.attn\.c_attn\)"):
        transform(model, tmp_path, **TEXT)


def test_patterns_that_match_nothing_are_a_warning(tmp_path, logs):
    ignore = ["re:.*lm_head", "re:.*block_sparse_moe.*"]
    transform(make_model(tmp_path), tmp_path, ignore=ignore, **TEXT)
    warned = [line for line in logs if "no module matches" in line]
    assert len(warned) == 1 and "block_sparse_moe" in warned[0]


def test_change_is_relative_to_what_a_module_adds():
    torch.manual_seed(0)
    x = 100 * torch.randn(8, 16)
    added = torch.randn(8, 16)
    assert relative_change(x + added, x - added, x) == pytest.approx(2, rel=1e-2)
    assert relative_change(x + added, x + added, x) == 0
    assert relative_change(x + added, x - added) < 0.1
    # within the rounding of the dtype
    assert relative_change((x + added).bfloat16(), (x + added * 1.01).bfloat16(), x) < 0.1
    assert relative_change(x, x.masked_fill(x > 50, torch.inf)) == float("inf")
    # a few tokens, for example after a change of routing
    routed = x.clone()
    routed[0] = 0
    assert relative_change(x, routed) == 0


class MaskedAttention(torch.nn.Module):
    """Returns zeros for padding, and reads a weight without calling its Linear"""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x, attention_mask):
        values = self.q_proj(x) + linear(x, self.v_proj.weight)
        return torch.where(attention_mask[..., None], values, 0)


@pytest.mark.parametrize("is_masked", [True, False])
def test_padding_hides_no_change(is_masked):
    model = torch.nn.Module()
    model.attention = MaskedAttention()
    mask = (torch.arange(100) >= 80)[None]
    check = FunctionCheck(model, {"attention.v_proj": model.attention.v_proj}, {})
    hooks = []

    def register(module, hook, kind, with_kwargs):
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    check.watch(register, lambda name: mask if is_masked else None)
    with torch.no_grad():
        model.attention(torch.randn(1, 100, 64), attention_mask=mask)
        before = check.outputs(["attention.v_proj"])
        model.attention.v_proj.weight.mul_(-1)
    if is_masked:
        with pytest.raises(ValueError, match="without calling the Linear"):
            check.compare(before, ["attention.v_proj"])
    else:  # most tokens did not change: what the mask is for
        check.compare(before, ["attention.v_proj"])
