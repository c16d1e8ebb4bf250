# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of models with CAT transforms"""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.transformers.compression import compressed_tensors_utils
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
)
from loguru import logger
from tiny_models import (
    int_scheme,
    logits_of,
    make_loader,
    make_model,
    make_tokens,
    make_vision_language_model,
    relative_error,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cat_modifier import CATModifier
from cat_modifier.checkpoint.verify import find_damage
from cat_modifier.integrations.transformers import saving
from cat_modifier.integrations.transformers.atomic_folder import (
    UnfinishedSaveError,
    finish_save,
)

GOLDEN = Path(__file__).parents[2] / "checkpoint" / "golden"


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> PreTrainedModel:
    """Compress a model by two CATModifiers, without saving it"""
    model = make_model(tmp_path_factory.mktemp("model"))
    down = "re:.*down_proj"
    recipe = [
        CATModifier(transform_block_size=16, ignore=["lm_head", down]),
        CATModifier(transform_block_size=32, targets=[down]),
        QuantizationModifier(**int_scheme(4, 4)),
    ]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    # a forward pass after a save would decompress the weights, and change the next save
    model.logits = logits_of(model)
    return model


@pytest.fixture(scope="module")
def loaded() -> PreTrainedModel:
    model = load(GOLDEN)
    model.logits = logits_of(load(GOLDEN))
    return model


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Collect log messages about saved checkpoints"""
    found: list[str] = []

    def collect(message: str):
        if "The checkpoint is in" in message:
            found.append(message.strip())

    sink = logger.add(collect, format="{message}")
    yield found
    logger.remove(sink)


MODELS = ["compressed", "loaded"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((), {}),
        ((True,), {}),
        ((True, None, False, "30KB"), {}),
        ((), {"save_compressed": True}),
    ],
)
def test_arguments_by_position_and_by_name(request, tmp_path, messages, name, args, kwargs):
    model = request.getfixturevalue(name)
    model.save_pretrained(tmp_path / "saved", *args, **kwargs)
    assert messages == [f"The checkpoint is in {tmp_path / 'saved'}"]
    assert relative_error(logits_of(load(tmp_path / "saved")), model.logits) < 1e-5
    is_sharded = (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert is_sharded == (len(args) == 4)
    assert not list((tmp_path / "saved").glob(".*"))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_supported_is_an_error_that_writes_nothing(request, tmp_path, name):
    model = request.getfixturevalue(name)
    target = tmp_path / "saved"
    with pytest.raises(ValueError, match="cat-modifier push FOLDER REPO"):
        model.save_pretrained(target, push_to_hub=True)
    with pytest.raises(ValueError, match="cat-modifier push FOLDER REPO"):
        model.save_pretrained(target, True, None, True)
    with pytest.raises(ValueError, match="distributed_checkpoint"):
        model.save_pretrained(target, distributed_checkpoint=True)
    with pytest.raises(ValueError, match="`variant` is not supported"):
        model.save_pretrained(target, variant="fp16")
    with pytest.raises(TypeError, match="is_main_process"):
        model.save_pretrained(target, True, is_main_process=True)
    assert not target.exists()


@pytest.mark.parametrize("name", MODELS)
def test_a_process_that_is_not_the_main_one_writes_nothing(request, tmp_path, messages, name):
    request.getfixturevalue(name).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    assert not messages


def test_an_empty_state_dict_is_an_error_that_leaves_the_old_checkpoint(
    compressed, tmp_path, messages
):
    load(GOLDEN).save_pretrained(tmp_path)
    messages.clear()
    with pytest.raises(ValueError, match="`state_dict` is empty"):
        compressed.save_pretrained(tmp_path, state_dict={})
    assert not messages
    assert torch.equal(logits_of(load(tmp_path)), logits_of(load(GOLDEN)))


@pytest.mark.parametrize("name", MODELS)
def test_wrapping_again_wraps_once(request, tmp_path, messages, name):
    model = request.getfixturevalue(name)
    method = model.save_pretrained
    saving.save_atomically(model)
    modify_save_pretrained(model)  # like oneshot
    assert model.save_pretrained == method
    model.save_pretrained(tmp_path)
    assert len(messages) == 1
    assert relative_error(logits_of(load(tmp_path)), model.logits) < 1e-5


def test_a_copy_of_a_model_saves_its_own_weights(loaded, tmp_path):
    copied = copy.deepcopy(loaded)
    with torch.no_grad():
        copied.model.norm.weight.mul_(2)
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path)), logits_of(copied))
    assert not torch.equal(logits_of(copied), logits_of(loaded))


def test_a_model_that_is_not_quantized_is_an_error(tmp_path):
    model = make_model(tmp_path / "model")
    recipe = [CATModifier(transform_block_size=16)]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens()))
    with pytest.raises(ValueError, match="nothing is quantized"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", range(6))
def test_an_error_while_files_are_moved_loses_nothing(
    request, tmp_path, monkeypatch, name, error, number
):
    """With real checkpoints. test_atomic_folder.py tests every step"""
    model = request.getfixturevalue(name)
    make_model(tmp_path, seed=1).save_pretrained(tmp_path)  # an older checkpoint
    older = logits_of(load(tmp_path))
    (tmp_path / "model_backup.safetensors").write_text("of the user")
    replace, calls = os.replace, []

    def replace_or_fail(*args, **kwargs):
        if Path(args[0]).parent.name == ".cat-save-moving":
            calls.append(args)
            if len(calls) == number + 1:
                raise error
        replace(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_fail)
        try:
            model.save_pretrained(tmp_path)
        except (UnfinishedSaveError, KeyboardInterrupt) as raised:
            assert raised is error or str(tmp_path / ".cat-save-moving") in str(raised)
            with pytest.raises(ValueError, match="Unrecognized model in"):  # no config.json
                load(tmp_path)
            finish_save(tmp_path)
        else:
            assert len(calls) < number + 1
    assert len(calls) >= 2
    assert relative_error(logits_of(load(tmp_path)), model.logits) < 1e-5
    assert relative_error(logits_of(load(tmp_path)), older) > 0.1
    assert (tmp_path / "model_backup.safetensors").exists()


def test_weights_are_kept_if_what_follows_them_cannot_be_written(
    compressed, tmp_path, monkeypatch
):
    def fail(*args):
        raise OSError("no such file")

    name = "copy_python_files_from_model_cache"
    monkeypatch.setattr(compressed_tensors_utils, name, fail)
    with pytest.raises(UnfinishedSaveError, match="All weights are written.*no such file"):
        compressed.save_pretrained(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    # they are marked, and can be read where they are
    assert relative_error(logits_of(load(folder)), compressed.logits) < 1e-5
    monkeypatch.undo()
    compressed.save_pretrained(tmp_path)
    assert not folder.exists()
    assert relative_error(logits_of(load(tmp_path)), compressed.logits) < 1e-5


def run_oneshot(tmp_path: Path, seed: int) -> PreTrainedModel:
    """Quantize a model with a tokenizer that names the seed, and save both to `saved`"""
    model = make_model(tmp_path / "model", seed=seed)
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_with": seed}))
    oneshot(
        model=model,
        recipe=[CATModifier(transform_block_size=16), QuantizationModifier(**int_scheme(4, 4))],
        dataset=make_loader(make_tokens()),
        output_dir=str(tmp_path / "saved"),
    )
    return model


def tokenizer_of(folder: Path) -> int:
    return json.loads((folder / "tokenizer_config.json").read_text())["made_with"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_tokenizer_that_oneshot_cannot_save_leaves_the_older_model(
    tmp_path, monkeypatch, error
):
    run_oneshot(tmp_path, seed=0)
    saved = tmp_path / "saved"
    older = logits_of(load(saved))
    save = PreTrainedTokenizerBase.save_pretrained

    def fail(self, folder, *args, **kwargs):
        if Path(folder).parts[-1] == "model":
            return save(self, folder, *args, **kwargs)
        (Path(folder) / "tokenizer_config.json").write_text("half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises((UnfinishedSaveError, KeyboardInterrupt)):
            run_oneshot(tmp_path, seed=1)
    assert torch.equal(logits_of(load(saved)), older)
    assert tokenizer_of(saved) == 0
    assert not find_damage(saved)
    model = run_oneshot(tmp_path, seed=1)
    assert relative_error(logits_of(load(saved)), logits_of(model)) < 1e-5
    assert tokenizer_of(saved) == 1
    assert not find_damage(saved)
    (saved / "tokenizer.json").unlink()
    assert find_damage(saved) == ["tokenizer.json is missing"]


def test_weights_of_another_checkpoint_are_warned_of(loaded, tmp_path, logs):
    (tmp_path / "model.fp16.safetensors").write_text("of a variant")
    loaded.save_pretrained(tmp_path)
    assert any("move model.fp16.safetensors to another folder" in one for one in logs)
    assert "model.fp16.safetensors is not of this checkpoint" in find_damage(tmp_path)[0]


@pytest.mark.slow
def test_oneshot_saves_into_a_folder_with_an_older_checkpoint(tmp_path):
    """Tokenizer and recipe are written too, readable for all users"""
    for seed in range(2):
        model = make_model(tmp_path / "model", seed=seed)
        recipe = [
            CATModifier(transform_block_size=16),
            QuantizationModifier(**int_scheme(4, 4)),
        ]
        target = tmp_path / "saved"
        loader = make_loader(make_tokens())
        oneshot(model=model, recipe=recipe, dataset=loader, output_dir=str(target))
        assert relative_error(logits_of(load(target)), logits_of(model)) < 1e-5
    assert {"recipe.yaml", "tokenizer.json"} <= {path.name for path in target.iterdir()}
    modes = {path.stat().st_mode for path in target.iterdir() if path.is_file()}
    assert len(modes) == 1
    groups = json.loads((target / "config.json").read_text())["quantization_config"]
    assert groups["config_groups"]["group_0"]["format"] == "cat-modifier/pack-quantized"


def test_a_quantized_head_is_untied_wherever_the_config_says_so(tmp_path):
    model = make_vision_language_model(tmp_path / "original", tied=True)
    ignore = ["re:.*visual.*"]
    scheme = int_scheme(4, 8, targets=["Linear", "re:.*lm_head"]) | {"ignore": ignore}
    recipe = [CATModifier(ignore=ignore), QuantizationModifier(**scheme)]
    tokens = make_tokens().clamp_min(7)  # the others stand for pictures
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "original"),
        recipe=recipe,
        dataset=make_loader(tokens),
        output_dir=str(tmp_path / "out"),
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        loaded = type(model).from_pretrained(tmp_path / "out").eval()
        assert relative_error(loaded(input_ids=tokens).logits, expected) < 1e-5
