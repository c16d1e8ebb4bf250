# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from tiny_models import (
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    make_whisper,
    relative_error,
)
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from cat_modifier import CATModifier, CATTrainingModifier
from cat_modifier.modifiers.cat_training import base as training_module

pytestmark = pytest.mark.slow

SCHEME = int_scheme(4, 4)
FAST = {"steps": 20, "batch_size": 4}


def float_scheme(name: str) -> dict:
    return {"targets": ["Linear"], "scheme": name, "ignore": ["lm_head"]}


def group_of(weights: dict, inputs: dict) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def compress(model, *modifiers, tokens=None, mask=None, last=None):
    tokens = make_tokens(12) if tokens is None else tokens
    last = last or QuantizationModifier(**SCHEME)
    oneshot(model=model, recipe=[*modifiers, last], dataset=make_loader(tokens, mask))
    return model


def hidden_error(model, original, tokens) -> float:
    """Compute the relative error of the last hidden states, mean over tokens"""
    with torch.no_grad():
        found, expected = (
            one.model(tokens, use_cache=False).last_hidden_state.double()
            for one in (model, original)
        )
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item()


@pytest.mark.parametrize("rotation", ["hadamard", "block-hadamard"])
@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "cohere"])
def test_error_is_less(tmp_path, family, rotation):
    original = make_model(tmp_path, family)
    # on the training data: a few random tokens generalize to no others
    tokens = make_tokens(12)
    models = {}
    for name, training in (("closed", []), ("trained", [CATTrainingModifier(**FAST)])):
        models[name] = compress(
            make_model(tmp_path, family),
            CATModifier(transform_block_size=32, rotation=rotation, precision=torch.float32),
            *training,
        )
    errors = {name: hidden_error(one, original, tokens) for name, one in models.items()}
    assert errors["trained"] < errors["closed"]


def test_function_is_kept(tmp_path):
    """Up to the error of 8-bit quantization"""
    original = make_model(tmp_path, "llama-biases")
    model = compress(
        make_model(tmp_path, "llama-biases"),
        CATModifier(transform_block_size=32),
        CATTrainingModifier(**FAST),
        last=QuantizationModifier(**int_scheme(8, 8)),
    )
    assert relative_error(logits_of(model), logits_of(original)) < 0.05


# symmetric integers round the largest value of a row up or down by its last bit
ASYMMETRIC = int_scheme(4, 4)
ASYMMETRIC["config_groups"]["group_0"]["weights"]["symmetric"] = False


@pytest.mark.parametrize("scheme", [ASYMMETRIC, float_scheme("MXFP4")], ids=["W4A4", "MXFP4"])
def test_what_is_trained_is_what_is_quantized(tmp_path, scheme, monkeypatch):
    """The last layer returns in training what it returns in the quantized model"""
    seen = {}
    insert = CATTrainingModifier.on_calibration_end

    def remember(self, state, event, **kwargs):
        seen["hidden"] = torch.cat(self._hidden)
        insert(self, state, event, **kwargs)

    monkeypatch.setattr(CATTrainingModifier, "on_calibration_end", remember)
    model = make_model(tmp_path, "llama-biases")
    # with other tokens a weight may be halfway between two integers, which changes all outputs
    tokens = make_tokens(12, seed=2)
    compress(
        model,
        CATModifier(transform_block_size=32),
        CATTrainingModifier(**FAST),
        tokens=tokens,
        last=QuantizationModifier(**scheme),
    )
    found = {}
    hook = model.model.layers[-1].register_forward_hook(
        lambda layer, args, output: found.update(output=output)
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    output = found["output"]
    output = output[0] if isinstance(output, tuple) else output
    error = (output - seen["hidden"]).norm(dim=-1) / output.norm(dim=-1)
    assert error.median() < 1e-3  # a few activations are halfway, too


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_checkpoint_loads(tmp_path, family):
    model = make_model(tmp_path, family, dtype=torch.bfloat16)
    compress(model, CATModifier(transform_block_size=32), CATTrainingModifier(**FAST))
    expected = logits_of(model)
    # bfloat16 holds what int8 held before
    schemes = model.transform_config.config_groups.values()
    assert {scheme.precision for scheme in schemes} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "quantized", save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype="auto").eval()
    assert relative_error(logits_of(loaded), expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_trained(tmp_path, dtype, monkeypatch):
    trainings = spy_on_fit(monkeypatch)
    model, tokens = make_model(tmp_path, dtype=dtype), make_tokens(12, seed=1)
    transforms = CATModifier(transform_block_size=32)
    compress(model, transforms, CATTrainingModifier(**FAST), tokens=tokens)
    # some layer may find nothing better in so few steps
    assert sum(one.after for one in trainings) < 0.97 * sum(one.before for one in trainings)


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4", "NVFP4A16"])
def test_floats_are_trained(tmp_path, scheme, monkeypatch):
    trainings = spy_on_fit(monkeypatch)
    original, tokens, models = make_model(tmp_path), make_tokens(32), {}
    slow = CATTrainingModifier(**FAST, learning_rate=0.001)
    for name, training in (("closed", []), ("trained", [slow])):
        models[name] = compress(
            make_model(tmp_path),
            CATModifier(transform_block_size=32, rotation="block-hadamard"),
            *training,
            tokens=tokens,
            last=QuantizationModifier(**float_scheme(scheme)),
        )
    assert trainings[0].after < 0.97 * trainings[0].before
    errors = {name: hidden_error(one, original, tokens) for name, one in models.items()}
    assert errors["trained"] < errors["closed"]


@pytest.mark.parametrize("scheme", [SCHEME, float_scheme("NVFP4")], ids=["W4A4", "NVFP4"])
def test_experts_are_trained(tmp_path, scheme, monkeypatch):
    trainings = spy_on_fit(monkeypatch)
    model = make_model(tmp_path, "qwen3-moe", num_experts=4, num_experts_per_tok=2)
    last = QuantizationModifier(**scheme)
    cat = CATModifier(transform_block_size=32, tensor_parallel_size=1)
    compress(model, cat, CATTrainingModifier(**FAST), last=last)
    assert any("experts" in name for name in trainings[0].corrections)
    assert trainings[0].after < 0.9 * trainings[0].before
    # the second layer may have nothing left to gain
    assert all(one.after <= one.before for one in trainings)


def spy_on_fit(monkeypatch) -> list:
    """Record the result of each layer's training"""
    trainings, fit = [], training_module.fit

    def remember(*args):
        trainings.append(fit(*args))
        return trainings[-1]

    monkeypatch.setattr(training_module, "fit", remember)
    return trainings


def test_nothing_is_left_behind(tmp_path):
    model = make_model(tmp_path)
    wanted = {name for name, one in model.named_parameters() if one.requires_grad}
    modifier = CATTrainingModifier(steps=2)
    compress(model, CATModifier(transform_block_size=32), modifier)
    assert not (modifier._calls or modifier._names or modifier._inputs)
    assert modifier._hidden is None and modifier._expected is None
    norms = {name for name in wanted if "norm" in name}
    for name, one in model.named_parameters():
        assert one.grad is None
        assert one.requires_grad or name not in norms


def test_layers_without_transforms_are_passed(tmp_path):
    model = make_model(tmp_path, num_hidden_layers=3)
    ignore = ["re:.*lm_head", r"re:.*layers\.1\..*"]
    compress(
        model, CATModifier(transform_block_size=32, ignore=ignore), CATTrainingModifier(**FAST)
    )
    original = make_model(tmp_path, num_hidden_layers=3)
    closed = make_model(tmp_path, num_hidden_layers=3)
    compress(closed, CATModifier(transform_block_size=32, ignore=ignore))
    tokens = make_tokens(12)
    # a random model may have nothing left to gain; broken weights have error 1
    assert hidden_error(model, original, tokens) < 1.05 * hidden_error(closed, original, tokens)


def test_gptq_follows(tmp_path):
    errors = []
    for training in ([], [CATTrainingModifier(**FAST)]):
        model = make_model(tmp_path)
        compress(
            model, CATModifier(transform_block_size=32), *training, last=GPTQModifier(**SCHEME)
        )
        errors.append(hidden_error(model, make_model(tmp_path), make_tokens(12)))
    # GPTQ does not round to nearest, so training need not help; broken weights have error 1
    assert errors[1] < 1.2 * errors[0]


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
                CATTrainingModifier(**FAST),
                tokens=one,
                mask=mask,
            )
        )
        for one in (tokens, noise)
    ]
    assert relative_error(*results) < 1e-4


def test_samples_of_padding_alone_are_left_out(tmp_path):
    tokens = make_tokens(6)
    mask = torch.ones_like(tokens)
    mask[-1] = 0  # would be held out
    model = make_model(tmp_path)
    before = logits_of(model)
    compress(model, CATModifier(), CATTrainingModifier(**FAST), tokens=tokens, mask=mask)
    # of broken weights it is 1 or more
    assert relative_error(logits_of(model), before) < 0.8


class Interruption(Exception):
    pass


def test_goes_on_after_an_interruption(tmp_path, monkeypatch):
    folder = str(tmp_path / "corrections")
    make_model(tmp_path)
    fit, fitted = training_module.fit, []

    def run(seed=0, cat=None, **options):
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        modifiers = (
            CATModifier(transform_block_size=32, **(cat or {})),
            CATTrainingModifier(**(FAST | options)),
        )
        return logits_of(compress(model, *modifiers, tokens=make_tokens(12, seed=seed)))

    def stop(layer, *args):
        if fitted:
            raise Interruption
        fitted.append(layer.name)
        return fit(layer, *args)

    uninterrupted = run()
    monkeypatch.setattr(training_module, "fit", stop)
    with pytest.raises(Interruption):
        run(checkpoint_dir=folder)
    assert fitted == ["model.layers.0"]
    fitted.clear()
    monkeypatch.setattr(
        training_module,
        "fit",
        lambda layer, *args: (fitted.append(layer.name), fit(layer, *args))[1],
    )
    resumed = run(checkpoint_dir=folder)
    assert fitted == ["model.layers.1"]
    assert relative_error(resumed, uninterrupted) < 1e-4
    for others in (
        {"learning_rate": 0.001},
        {"seed": 1},
        {"cat": {"clip_activations": False}},
        {"cat": {"alignment_strength": 0.0}},
    ):
        with pytest.raises(ValueError, match="another model, recipe or calibration data"):
            run(checkpoint_dir=folder, **others)
    path = tmp_path / "corrections" / "model.layers.0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged: remove it"):
        run(checkpoint_dir=folder)


def test_layers_which_do_not_get_better_are_left(tmp_path):
    model = make_model(tmp_path)
    steep = CATTrainingModifier(steps=4, learning_rate=100.0)
    logits = logits_of(compress(model, CATModifier(transform_block_size=32), steep))
    closed = logits_of(compress(make_model(tmp_path), CATModifier(transform_block_size=32)))
    assert torch.equal(logits, closed)


@pytest.mark.parametrize(
    "modifiers, scheme, message",
    [
        ([CATTrainingModifier], SCHEME, "put one before it"),
        ([CATTrainingModifier, CATModifier], SCHEME, "put one before it"),
        (
            [CATModifier, CATTrainingModifier],
            SCHEME | {"ignore": ["lm_head", "re:.*down_proj"]},
            "No modifier quantizes the weight",
        ),
    ],
)
def test_refusals(tmp_path, modifiers, scheme, message):
    model = make_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        compress(model, *(one() for one in modifiers), last=QuantizationModifier(**scheme))


ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    "scheme",
    [
        float_scheme("FP8"),
        float_scheme("FP8_BLOCK"),
        group_of(ROWS, ROWS | {"strategy": "tensor_group", "group_size": 32}),
        group_of(ROWS, ROWS | {"strategy": "tensor", "dynamic": True}),
        group_of(ROWS, ROWS | {"strategy": "token", "dynamic": True, "symmetric": False}),
    ],
    ids=["weights of one scale", "blocks", "static", "tensor", "asymmetric floats"],
)
def test_schemes_which_are_refused(tmp_path, scheme):
    recipe = [CATModifier(), CATTrainingModifier()]
    with pytest.raises(ValueError, match="does not support the scheme"):
        compress(make_model(tmp_path), *recipe, last=QuantizationModifier(**scheme))


def test_corrections_for_integers_are_not_for_floats(tmp_path):
    args = {"num_bits": 4, "strategy": "group", "group_size": 32}
    folder = str(tmp_path / "corrections")
    schemes = [group_of(args, args | {"dynamic": True}), float_scheme("MXFP4")]

    def run(scheme):
        training = CATTrainingModifier(steps=1, checkpoint_dir=folder)
        last = QuantizationModifier(**scheme)
        compress(make_model(tmp_path), CATModifier(), training, last=last)

    run(schemes[0])
    with pytest.raises(ValueError, match="another model, recipe or calibration data"):
        run(schemes[1])


def test_layers_in_parts_are_refused(tmp_path):
    recipe = [CATModifier(), CATTrainingModifier(steps=1), QuantizationModifier(**SCHEME)]
    with pytest.raises(ValueError, match="leave `sequential_targets`"):
        oneshot(
            model=make_model(tmp_path),
            recipe=recipe,
            dataset=make_loader(make_tokens()),
            sequential_targets=["LlamaMLP"],
        )


def test_quantized_weights_are_refused(tmp_path):
    recipe = [CATModifier(), QuantizationModifier(**SCHEME), CATTrainingModifier()]
    with pytest.raises(ValueError, match="quantized already"):
        oneshot(model=make_model(tmp_path), recipe=recipe, dataset=make_loader(make_tokens()))


def test_one_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two batches"):
        compress(
            make_model(tmp_path), CATModifier(), CATTrainingModifier(), tokens=make_tokens(1)
        )


def test_layers_of_an_encoder_that_cannot_be_cut_out_are_a_warning(tmp_path):
    """As of Whisper, whose encoder runs as one piece in the sequential pipeline"""
    model = make_whisper(tmp_path, decoder_layers=2)
    samples = [
        {"input_features": torch.randn(8, 40), "decoder_input_ids": tokens}
        for tokens in make_tokens(4)
    ]
    messages = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(tmp_path),
        recipe=[
            CATModifier(ignore=["re:.*proj_out"]),
            CATTrainingModifier(steps=2, batch_size=2),
            QuantizationModifier(**(SCHEME | {"ignore": ["re:.*proj_out"]})),
        ],
        dataset=DataLoader(samples, batch_size=1),
    )
    logger.remove(sink)
    (warning,) = (one for one in messages if "were not trained" in one)
    assert "model.encoder.layers.0" in warning and "decoder" not in warning
