# SPDX-License-Identifier: Apache-2.0
from contextlib import ExitStack

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from tiny_models import (
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    relative_error,
    save_tokenizer,
)
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from cat_modifier import CATDistillationModifier, CATModifier, CATTrainingModifier
from cat_modifier.modifiers.cat_distillation import base, fit
from cat_modifier.modifiers.cat_training import insert

pytestmark = pytest.mark.slow

SCHEME = int_scheme(4, 4)
FAST = {"steps": 20, "batch_size": 4, "learning_rate": 0.0005, "patience": 10}


# symmetric integers round the largest value of a row up or down by its last bit
ASYMMETRIC = int_scheme(4, 4)
ASYMMETRIC["config_groups"]["group_0"]["weights"]["symmetric"] = False


def make_data() -> torch.Tensor:
    """Make the held-out batch one of the others: a few random tokens generalize to no others"""
    return make_tokens(4).repeat(3, 1)


def compress(model, *modifiers, tokens=None, mask=None, last=None):
    tokens = make_data() if tokens is None else tokens
    last = last or QuantizationModifier(**SCHEME)
    oneshot(model=model, recipe=[*modifiers, last], dataset=make_loader(tokens, mask))
    return model


def divergence(model, original, tokens) -> float:
    with torch.no_grad():
        ours, theirs = (
            one(tokens, use_cache=False).logits.double().log_softmax(-1)
            for one in (model, original)
        )
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item()


@pytest.fixture
def trainings(monkeypatch) -> list:
    """Results of all trainings"""
    found, train = [], fit.Distillation.fit

    def remember(self, *args):
        found.append(train(self, *args))
        return found[-1]

    monkeypatch.setattr(base.Distillation, "fit", remember)
    return found


@pytest.mark.parametrize("rotation", ["hadamard", "block-hadamard"])
@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "cohere"])
def test_divergence_is_less(tmp_path, family, rotation):
    original = make_model(tmp_path, family)
    found = {}
    for name, training in (("closed", []), ("trained", [CATDistillationModifier(**FAST)])):
        model = compress(
            make_model(tmp_path, family),
            CATModifier(transform_block_size=32, rotation=rotation, precision=torch.float32),
            *training,
            last=QuantizationModifier(**ASYMMETRIC),
        )
        found[name] = divergence(model, original, make_tokens(4)[-1:])
    assert found["trained"] < found["closed"]


def test_what_is_trained_is_what_is_quantized(tmp_path, trainings):
    """The divergence in training is that of the quantized model, on the held-out batch"""
    original = make_model(tmp_path, "llama-biases")
    model = compress(
        make_model(tmp_path, "llama-biases"),
        CATModifier(transform_block_size=32, precision=torch.float32),
        CATDistillationModifier(**FAST),
        last=QuantizationModifier(**ASYMMETRIC),
    )
    (training,) = trainings
    assert training.after < training.before
    found = divergence(model, original, make_tokens(4)[-1:])
    # a few values are halfway between two integers
    assert found == pytest.approx(training.after, rel=0.02)


def test_gradients_are_those_of_the_divergence(tmp_path, monkeypatch):
    """The same as from one graph of the whole computation"""
    errors = []

    def compare(self, *args):
        self._evaluate()
        batch = self.samples[:2]
        self._add_gradients(batch)
        expected = torch.zeros(())
        with ExitStack() as stack:
            teachers = [self.model(**one).logits for one in batch]
            for layer, ratios in zip(self.layers, self._ratios, strict=True):
                tensors = layer.quantize(layer.correct(self.corrections), ratios)
                stack.enter_context(layer.computing_with(tensors))
            for sample, teacher in zip(batch, teachers, strict=True):
                student, teacher = (
                    one.log_softmax(-1) for one in (self.model(**sample).logits, teacher)
                )
                losses = kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
                expected = expected + losses.mean() / len(batch)
        found = [one.grad for one in self.corrections.values()]
        gradients = torch.autograd.grad(expected, list(self.corrections.values()))
        errors.extend(relative_error(*pair) for pair in zip(found, gradients, strict=True))
        raise InterruptedError

    monkeypatch.setattr(base.Distillation, "fit", compare)
    cat = CATModifier(transform_block_size=32, precision=torch.float32)
    with pytest.raises(InterruptedError):
        compress(make_model(tmp_path, "llama-biases"), cat, CATDistillationModifier())
    assert len(errors) == 8 and max(errors) < 1e-3


def test_divergence_keeps_no_probabilities():
    """They would take more memory than a small model"""
    student = torch.randn(1100, 64, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(1100, 64, dtype=torch.bfloat16)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.dtype == torch.float32 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = fit.divergence(student, teacher)
    assert sum(kept) < 100
    ours, theirs = (one.double().log_softmax(-1) for one in (student, teacher))
    expected = kl_div(ours, theirs, reduction="sum", log_target=True) / len(student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    exact, rounded = (torch.autograd.grad(one, student)[0] for one in (expected, found))
    assert relative_error(rounded.double(), exact.double()) < 0.01


def test_function_is_kept(tmp_path):
    """Up to the error of 8-bit quantization"""
    model = compress(
        make_model(tmp_path, "llama-biases"),
        CATModifier(transform_block_size=32),
        CATDistillationModifier(**FAST),
        last=QuantizationModifier(**int_scheme(8, 8)),
    )
    original = make_model(tmp_path, "llama-biases")
    assert relative_error(logits_of(model), logits_of(original)) < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpoint_loads(tmp_path, family):
    model = make_model(tmp_path, family, dtype=torch.bfloat16)
    compress(model, CATModifier(transform_block_size=32), CATDistillationModifier(**FAST))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "quantized", save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype="auto").eval()
    assert relative_error(logits_of(loaded), expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_trained(tmp_path, dtype, trainings):
    model = make_model(tmp_path, dtype=dtype)
    compress(model, CATModifier(transform_block_size=32), CATDistillationModifier(**FAST))
    assert trainings[0].after < 0.97 * trainings[0].before


def test_experts_are_trained(tmp_path, trainings, monkeypatch):
    """Those that tokens are routed to; oneshot lets all experts see all tokens"""
    add, flags = fit.Distillation._add_gradients, []

    def look(self, batch):
        flags.append(get_calibrate_all_experts_flag())
        add(self, batch)

    monkeypatch.setattr(fit.Distillation, "_add_gradients", look)
    model = make_model(tmp_path, "qwen3-moe", num_experts=4, num_experts_per_tok=2)
    cat = CATModifier(transform_block_size=32, tensor_parallel_size=1)
    compress(model, cat, CATDistillationModifier(**FAST))
    (training,) = trainings
    assert flags and not any(flags)
    assert any("experts" in name for name in training.corrections)
    assert training.after < training.before


def test_follows_training_of_layers_and_precedes_gptq(tmp_path, trainings):
    recipe = [CATTrainingModifier(steps=4), CATDistillationModifier(**FAST)]
    original, found = make_model(tmp_path), []
    for training in ([], recipe):
        cat = CATModifier(transform_block_size=32)
        model = compress(make_model(tmp_path), cat, *training, last=GPTQModifier(**SCHEME))
        found.append(divergence(model, original, make_tokens(4)))
    assert trainings[0].after < trainings[0].before
    # GPTQ does not round to nearest, so training need not help
    assert found[1] < 1.2 * found[0]


def test_padding_does_not_count(tmp_path):
    tokens = make_tokens(6)
    mask = torch.ones_like(tokens)
    mask[:, 30:] = 0
    noise = tokens.clone()
    noise[:, 30:] = make_tokens(6, seed=5)[:, 30:]
    results = [
        logits_of(
            compress(
                make_model(tmp_path),
                CATModifier(transform_block_size=32),
                CATDistillationModifier(**FAST),
                tokens=one,
                mask=mask,
            )
        )
        for one in (tokens, noise)
    ]
    assert relative_error(*results) < 1e-4


def test_nothing_is_left_behind(tmp_path):
    model = make_model(tmp_path)
    wanted = {name for name, one in model.named_parameters() if one.requires_grad}
    compress(model, CATModifier(transform_block_size=32), CATDistillationModifier(steps=2))
    norms = {name for name in wanted if "norm" in name}
    for name, one in model.named_parameters():
        assert one.grad is None
        assert one.requires_grad or name not in norms
    for layer in model.model.layers:
        assert layer.forward.__qualname__ == f"{type(layer).__name__}.forward"


def test_mode_of_the_model_does_not_matter(tmp_path, trainings):
    """In training mode attention has dropout, which must neither act nor be forgotten"""
    for is_training in (False, True):
        model = make_model(tmp_path, attention_dropout=0.3)
        model.set_attn_implementation("eager")
        compress(
            model.train(is_training),
            CATModifier(transform_block_size=32),
            CATDistillationModifier(**FAST),
        )
        assert model.training == is_training
    assert trainings[0].after == pytest.approx(trainings[1].after, rel=0.01)
    assert trainings[1].after < trainings[1].before


def test_nested_layers_are_corrected_once(tmp_path, trainings):
    """As of Zamba2, whose hybrid layers hold layers that Transformers does not split, too"""
    model = make_zamba2(tmp_path)
    original = make_zamba2(tmp_path)
    ignore = ["re:.*lm_head", "re:.*shared_transformer.*"]
    compress(
        model,
        CATModifier(transform_block_size=32, precision=torch.float32, ignore=ignore),
        CATDistillationModifier(**FAST),
        last=QuantizationModifier(**(ASYMMETRIC | {"ignore": ignore})),
    )
    (training,) = trainings
    assert training.after < training.before
    found = divergence(model, original, make_tokens(4)[-1:])
    assert found == pytest.approx(training.after, rel=0.02)


def make_zamba2(folder):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "zamba2",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        mamba_d_state=16,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        num_mem_blocks=1,
        chunk_size=16,
        use_shared_attention_adapter=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_padding_of_an_encoder_is_not_that_of_the_decoder(tmp_path, trainings):
    """As of T5, whose stacks keep caches of their own, too"""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5", vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    samples = []
    for tokens in make_data():
        mask = torch.ones_like(tokens)
        mask[len(tokens) // 2 :] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens}
        samples.append(inputs)
    batch = {name: one[None] for name, one in samples[0].items()}
    assert fit.predicted_tokens(model, batch) is None
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(tmp_path),
        recipe=[
            CATModifier(transform_block_size=32, precision=torch.float32),
            CATDistillationModifier(**FAST),
            QuantizationModifier(**SCHEME),
        ],
        dataset=DataLoader(samples, batch_size=1),
    )
    assert trainings[0].after < trainings[0].before


def test_gradients_that_are_not_finite_end_the_training(tmp_path, monkeypatch, warnings):
    add, steps = fit.Distillation._add_gradients, []

    def spoil(self, batch):
        add(self, batch)
        steps.append(len(steps))
        if len(steps) == 5:
            next(iter(self.corrections.values())).grad[0, 0, 0] = torch.inf

    monkeypatch.setattr(fit.Distillation, "_add_gradients", spoil)
    compress(
        make_model(tmp_path),
        CATModifier(transform_block_size=32),
        CATDistillationModifier(**FAST),
    )
    assert len(steps) == 5
    assert any("after 4 steps, because its gradients" in one for one in warnings)


@pytest.fixture
def warnings():
    messages = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    yield messages
    logger.remove(sink)


def test_batches_of_padding_are_left_out(tmp_path, trainings):
    tokens = make_data()
    mask = torch.ones_like(tokens)
    mask[-1] = 0
    cat = CATModifier(transform_block_size=32)
    compress(
        make_model(tmp_path), cat, CATDistillationModifier(**FAST), tokens=tokens, mask=mask
    )
    assert trainings[0].after < trainings[0].before


@pytest.mark.parametrize("writes", [0, 3])
def test_a_model_that_changed_in_part_is_not_saved(tmp_path, monkeypatch, writes):
    """Memory may run out between the transforms and the weights"""
    write, written = insert.update_offload_parameter, []

    def fail(*args):
        if len(written) == writes:
            raise MemoryError("out of memory")
        written.append(write(*args))

    monkeypatch.setattr(insert, "update_offload_parameter", fail)
    model = make_model(tmp_path)
    with pytest.raises(MemoryError):
        compress(model, CATModifier(transform_block_size=32), CATDistillationModifier(steps=4))
    with pytest.raises(ValueError, match="A modifier did not finish"):
        model.save_pretrained(tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_a_model_that_does_not_get_better_is_left(tmp_path, warnings):
    steep = CATDistillationModifier(steps=4, learning_rate=100.0)
    model = compress(make_model(tmp_path), CATModifier(transform_block_size=32), steep)
    closed = compress(make_model(tmp_path), CATModifier(transform_block_size=32))
    assert torch.equal(logits_of(model), logits_of(closed))
    # also in the dtypes of the transforms: training would store int8 as bfloat16
    groups, same = (one.transform_config.config_groups for one in (model, closed))
    assert groups.keys() == same.keys() and any("int8" in name for name in groups)
    assert any("No step was better" in one for one in warnings)


@pytest.mark.parametrize(
    "modifiers, scheme, message",
    [
        ([CATDistillationModifier], SCHEME, "put one before it"),
        ([CATDistillationModifier, CATModifier], SCHEME, "put one before it"),
        (
            [CATModifier, CATDistillationModifier],
            SCHEME | {"ignore": ["lm_head", "re:.*down_proj"]},
            "No modifier quantizes the weight",
        ),
    ],
)
def test_refusals(tmp_path, modifiers, scheme, message):
    model = make_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        compress(model, *(one() for one in modifiers), last=QuantizationModifier(**scheme))


def test_quantized_weights_are_refused(tmp_path):
    recipe = [CATModifier(), QuantizationModifier(**SCHEME), CATDistillationModifier()]
    with pytest.raises(ValueError, match="quantized already"):
        oneshot(model=make_model(tmp_path), recipe=recipe, dataset=make_loader(make_tokens()))


def test_one_batch_is_refused(tmp_path):
    recipe = [CATModifier(), CATDistillationModifier()]
    with pytest.raises(ValueError, match="two batches"):
        compress(make_model(tmp_path), *recipe, tokens=make_tokens(1))


def test_models_without_logits_are_refused(tmp_path):
    make_model(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="returns no logits"):
        compress(model, CATModifier(), CATDistillationModifier())
