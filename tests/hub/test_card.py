# SPDX-License-Identifier: Apache-2.0
"""The model card that every saved checkpoint has"""

import json
import socket
import time
from pathlib import Path

import pytest
import yaml
from compressed_tensors.utils import patch_attr
from datasets import Dataset
from datasets.info import DatasetInfo
from hub_server import Repo
from huggingface_hub import RepoCard, constants
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tiny_models import (
    int_scheme,
    make_loader,
    make_model,
    make_tokens,
    make_vision_language_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cat_modifier import CATModifier
from cat_modifier.checkpoint.verify import find_damage
from cat_modifier.hub import base_model
from cat_modifier.hub.base_model import find_base_model
from cat_modifier.hub.card import update_evaluation
from cat_modifier.hub.markdown import code, fenced, plain, read_section, replace_section
from cat_modifier.hub.push import push
from cat_modifier.hub.run_record import RunRecord, dataset_ids
from cat_modifier.hub.schemes import describe_schemes

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden"
TAGS = ["cat-modifier", "compressed-tensors", "llm-compressor", "vllm"]
BASE_CARD = """---
license: other
license_name: some-license
license_link: https://example.org/license
base_model: org/what-it-was-tuned-from
---
"""


def recipe(bits: int = 4) -> list:
    return [
        CATModifier(transform_block_size=16),
        QuantizationModifier(**int_scheme(bits, bits)),
    ]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> PreTrainedModel:
    """A model that is quantized and not saved"""
    model = make_model(tmp_path_factory.mktemp("models") / "tiny")
    oneshot(model=model, recipe=recipe(), dataset=make_loader(make_tokens()))
    return model


def save(model: PreTrainedModel, folder: Path) -> RepoCard:
    model.save_pretrained(folder)
    assert not find_damage(folder)
    return RepoCard.load(folder / "README.md")


# ---- what it says ----------------------------------------------------------------------------


def test_oneshot_writes_a_card_with_all_that_is_known(tmp_path, logs):
    model = make_model(tmp_path / "tiny")
    (tmp_path / "tiny" / "README.md").write_text(BASE_CARD)
    rows = Dataset.from_dict({"input_ids": make_tokens().tolist()})
    rows.info.download_checksums = {"hf://datasets/org/chats@0123/data.parquet": {}}
    oneshot(model=model, recipe=recipe(), dataset=rows, output_dir=str(tmp_path / "saved"))
    card = RepoCard.load(tmp_path / "saved" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "other",
        "license_name": "some-license",
        "license_link": "https://example.org/license",
        "pipeline_tag": "text-generation",
        "datasets": ["org/chats"],
        "tags": [*TAGS, "w4a4", "int4", "arxiv:2603.04359"],
    }
    # its id on the Hub is not that of the model it was tuned from
    assert any("README.md names no `base_model`, since" in one for one in logs)
    assert "# tiny, W4A4 with CAT" in card.text
    about = read_section(card.text, "about")
    assert "4-bit weights and 4-bit activations (INT4)" in about
    assert about.index("pip install 'cat-modifier[serve]'") < about.index("vllm serve")
    assert "AutoModelForCausalLM.from_pretrained" in about
    creation = read_section(card.text, "creation")
    assert "Calibrated on 192 tokens in 4 samples of `org/chats`." in creation
    written = yaml.safe_load(creation.partition("```yaml\n")[2].partition("```")[0])
    assert written == yaml.safe_load((tmp_path / "saved" / "recipe.yaml").read_text())
    assert "llmcompressor 0." in creation
    measured = read_section(card.text, "measured").splitlines()
    (row,) = (line for line in measured if line.startswith("| `q_proj/k_proj/v_proj` |"))
    _, _, count, before, after, _ = (part.strip() for part in row.split("|"))
    assert count == "2"
    assert 5 < float(before) < float(after) < 30
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert f"| after, with transforms | {size / 1e6:.1f} |" in measured
    assert not read_section(card.text, "evaluation")


def test_a_save_without_a_tokenizer_has_a_card_that_a_user_may_edit(compressed, tmp_path):
    save(compressed, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert "README.md" not in (tmp_path / "SHA256SUMS").read_text()
    with (tmp_path / "README.md").open("a") as card:
        card.write("My notes")
    assert not find_damage(tmp_path)


@pytest.mark.parametrize(
    "bits, tags",
    [((4, 8), ["w4a8", "int4"]), ((8, 8), ["w8a8", "int8"]), ((4, None), ["w4a16", "int4"])],
)
def test_tags_are_those_of_the_scheme(tmp_path, bits, tags):
    model = make_model(tmp_path / "tiny")
    modifiers = [
        CATModifier(transform_block_size=16),
        QuantizationModifier(**int_scheme(*bits)),
    ]
    oneshot(model=model, recipe=modifiers, dataset=make_loader(make_tokens()))
    card = save(model, tmp_path / "saved")
    assert card.data.tags == [*TAGS, *tags, "arxiv:2603.04359"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "input_bits, text", [(4, "| NVIDIA GPU | refused"), (None, "| any | nothing")]
)
def test_experts_are_said_not_to_be_served_everywhere(tmp_path, input_bits, text):
    model = make_model(tmp_path / "tiny", family="qwen3-moe")
    modifiers = [
        CATModifier(transform_block_size=16),
        QuantizationModifier(**int_scheme(4, input_bits)),
    ]
    oneshot(model=model, recipe=modifiers, dataset=make_loader(make_tokens()))
    card = save(model, tmp_path / "saved")
    assert text in read_section(card.text, "about")
    assert "experts: " in read_section(card.text, "measured")


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4"])
def test_tags_of_floats(tmp_path, scheme):
    model = make_model(tmp_path / "tiny")
    modifiers = [
        CATModifier(transform_block_size=16, rotation="block-hadamard"),
        QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=["lm_head"]),
    ]
    oneshot(model=model, recipe=modifiers, dataset=make_loader(make_tokens()))
    card = save(model, tmp_path / "saved")
    assert card.data.tags == [*TAGS, "w4a4", scheme.lower(), "arxiv:2603.04359"]
    assert f"({scheme})" in card.text


@pytest.mark.slow
def test_the_task_is_that_of_the_class(tmp_path):
    model = make_vision_language_model(tmp_path / "tiny")
    scheme = int_scheme(4, 8)
    scheme["ignore"].append("re:.*visual.*")
    oneshot(
        model=model,
        # its processor needs torchvision
        processor=AutoTokenizer.from_pretrained(tmp_path / "tiny"),
        recipe=[CATModifier(transform_block_size=16), QuantizationModifier(**scheme)],
        dataset=make_loader(make_tokens()),
    )
    card = save(model, tmp_path / "saved")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText.from_pretrained" in card.text


def test_ids_of_datasets_are_observed():
    sources = {
        "hf://datasets/org/a@12/x.parquet": {},
        "hf://datasets/org/a@12/y.parquet": {},
        "https://example.org/z": {},
    }
    rows = Dataset.from_dict({"a": [1]}, info=DatasetInfo(download_checksums=sources))
    assert dataset_ids(rows.map(lambda row: row)) == ["org/a"]
    assert dataset_ids(Dataset.from_dict({"a": [1]})) == []
    assert dataset_ids([1, 2]) == []


def test_experts_are_one_kind():
    record = RunRecord(1, "float32")
    names = [f"layers.0.mlp.experts.{i}.{name}" for i in range(3) for name in ("up", "gate")]
    record.add(names, 5, 1.0, 2.0)
    record.add(["layers.1.mlp.experts.7.up", "layers.1.mlp.experts.7.gate"], 9, 3.0, 4.0)
    assert record.predictions == {"experts: up/gate": [(1.0, 2.0), (3.0, 4.0)]}
    assert record.tokens == 9


# ---- a card that is there already ------------------------------------------------------------


def test_a_users_card_is_updated(compressed, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nlanguage: de\nbase_model: org/base\ntags: [mine, w8a8]\n"
        "model-index:\n- name: x\n  unknown: [1, 2]\n---\n# My title\n\nMy text.\n"
    )
    card = save(compressed, tmp_path)
    text = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(text.split("---\n")[1])
    assert data["license"] == "mit" and data["language"] == "de"
    assert data["base_model"] == "org/base"
    assert data["tags"] == [*TAGS, "w4a4", "int4", "arxiv:2603.04359", "mine"]
    assert data["model-index"] == [{"name": "x", "unknown": [1, 2]}]
    assert card.text.startswith("# My title\n\nMy text.\n")
    assert card.text.count("# tiny, W4A4") == 0


def test_text_around_sections_stays_and_a_removed_one_stays_removed(compressed, tmp_path):
    first = save(compressed, tmp_path).text
    text = replace_section(f"---\na: 1\n---\n{first}", "about", "changed")
    begin, end = text.index("<!-- cat-modifier:measured"), text.index("<!-- cat-modifier:eval")
    (tmp_path / "README.md").write_text(f"{text[:begin]}In between.\n{text[end:]}The end.")
    again = save(compressed, tmp_path).text
    begin, end = (
        first.index("<!-- cat-modifier:measured"),
        first.index("<!-- cat-modifier:eval"),
    )
    assert again == f"{first[:begin]}In between.\n{first[end:]}The end."


def test_saving_again_changes_nothing(compressed, tmp_path):
    save(compressed, tmp_path)
    text = (tmp_path / "README.md").read_text()
    text = text.replace("library_name:", "# a comment\nlibrary_name:")
    (tmp_path / "README.md").write_text(text)
    save(compressed, tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_what_is_known_of_another_model_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN)
    path, tags = tmp_path / "README.md", []
    RunRecord(1, "float32").attach(model)  # as if it was made in this process
    for name in ("org/one", "org/one", "org/two"):
        with patch_attr(model.config, "_name_or_path", name):
            data = save(model, tmp_path).data.to_dict()
        assert (data["base_model"], data["base_model_relation"]) == (name, "quantized")
        tags.append(data["pipeline_tag"])
        path.write_text(path.read_text().replace("text-generation", "of-the-user"))
    assert tags == ["text-generation", "of-the-user", "text-generation"]


def test_a_loaded_checkpoint_keeps_its_card_and_its_evaluation(compressed, tmp_path):
    save(compressed, tmp_path / "one")
    assert update_evaluation(tmp_path / "one", "texts", "| a |\n|---|\n| 1 |", "of a test")
    text = (tmp_path / "one" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    save(model, tmp_path / "two")
    again = (tmp_path / "two" / "README.md").read_text()
    for name in ("creation", "measured", "evaluation"):
        assert read_section(again, name) == read_section(text, name)
    assert "| 1 |" in read_section(again, "evaluation")
    # of another run
    save(compressed, tmp_path / "one")
    text = (tmp_path / "one" / "README.md").read_text()
    assert not read_section(text, "evaluation")


def test_a_loaded_checkpoint_without_a_card_gets_what_is_observed(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN)
    card = save(model, tmp_path)
    assert card.data.tags == [*TAGS, "w4a4", "int4", "arxiv:2603.04359"]
    assert "vllm serve" in read_section(card.text, "about")
    assert not read_section(card.text, "creation")
    assert not read_section(card.text, "measured")


def test_an_evaluation_replaces_one_of_its_kind_alone(tmp_path):
    path = tmp_path / "README.md"
    head = b"---\r\n# comment\r\na: 1\r\n---\r\ntext\r\n"
    path.write_bytes(
        head + b"<!-- cat-modifier:evaluation -->\n<!-- /cat-modifier:evaluation -->\n"
    )
    evil = "| first |\n<!-- /cat-modifier:evaluation -->\n"
    assert update_evaluation(tmp_path, "texts", evil, "of 3 windows")
    assert update_evaluation(tmp_path, "tasks", "| task |", "--limit 10")
    assert update_evaluation(tmp_path, "texts", r"| sec\1ond |", "of 4 *windows*")
    text = path.read_bytes().decode()
    assert text.startswith("---\r\n# comment\r\na: 1\r\n---\r\ntext")
    section = read_section(text, "evaluation")
    assert section.count("## Evaluation") == 1 and "first" not in section
    for part in (r"| sec\1ond |", r"*of 4 \*windows\**", "| task |", r"*\-\-limit 10*"):
        assert section.count(part) == 1, part
    assert [one.name for one in tmp_path.iterdir()] == ["README.md"]


def test_a_card_of_somebody_else_is_left_alone(tmp_path):
    assert not update_evaluation(tmp_path, "texts", "| a |", "of a test")
    (tmp_path / "README.md").write_text("# Original model of somebody\n")
    assert not update_evaluation(tmp_path, "texts", "| a |", "of a test")
    assert (tmp_path / "README.md").read_text() == "# Original model of somebody\n"


# ---- untrusted text ------------------------------------------------------------------------

EVIL = (
    "a\n---\n# heading <script>x</script> ``` [b](javascript:c) | <!-- /cat-modifier:about -->"
)


def test_text_cannot_leave_its_place():
    assert "\n" not in plain(EVIL) and "<" not in plain(EVIL)
    assert "\n" not in code(EVIL) and "<!--" not in code(EVIL)
    assert code(EVIL).startswith("````") and code(EVIL).endswith("````")
    block = fenced(f"{EVIL}\n````\nend", "yaml").splitlines()
    assert block[0] == "`````yaml" and block[-1] == "`````"
    assert not any("<!--" in line for line in block)
    assert plain("a\u202eb\x00c") == "a b c"


def test_an_evil_base_model_and_recipe(compressed, tmp_path, monkeypatch, logs):
    folder = tmp_path / "x<script>`[a](b)`"
    folder.mkdir()
    front = {
        "license": EVIL,
        "license_name": EVIL,
        "license_link": 'javascript:"x"',
        "base_model": EVIL,
        "base_model_relation": "quantized",
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n{EVIL}")
    with patch_attr(compressed.config, "_name_or_path", str(folder)):
        card = save(compressed, tmp_path / "saved")
    assert (
        not {"license", "license_name", "license_link", "base_model"}
        & card.data.to_dict().keys()
    )
    assert "<script>" not in card.text
    assert "names no `base_model` and no `license`" in logs[-1]
    assert "vllm serve" in read_section(card.text, "about")


@pytest.mark.parametrize(
    "content",
    [b"---\na: [\n---\n", b"\xff\xfe---", b"---\n- 1\n---\n", b"---\na: !!x 1\n---\n"],
)
def test_a_base_card_that_cannot_be_read_is_one_sentence(compressed, tmp_path, logs, content):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_bytes(content)
    with patch_attr(compressed.config, "_name_or_path", str(tmp_path / "base")):
        card = save(compressed, tmp_path / "saved")
    assert "base, W4A4 with CAT" in card.text
    (line,) = (one for one in logs if "README.md" in one)
    assert "its README.md cannot be read" in line


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"\xff\xfe---"])
def test_a_card_that_cannot_be_updated_stays(compressed, tmp_path, logs, content):
    (tmp_path / "README.md").write_bytes(content)
    compressed.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    assert not find_damage(tmp_path)
    (line,) = (one for one in logs if "README.md" in one)
    assert "is not written or updated" in line


def test_a_folder_in_place_of_the_card_stays(compressed, tmp_path, logs):
    (tmp_path / "README.md").mkdir()
    compressed.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").is_dir()
    assert not find_damage(tmp_path)
    assert any("is not written or updated" in one and "IsADirectory" in one for one in logs)


# ---- the original model --------------------------------------------------------------------


def test_a_quantized_local_model_names_its_original(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nbase_model: org/base\nbase_model_relation: quantized\nlicense: mit\n"
        "license_link: LICENSE\n---\n"
    )
    found = find_base_model(str(tmp_path))
    assert (found.id, found.name) == ("org/base", "base")
    assert found.license == {
        "license": "mit",
        "license_link": "https://huggingface.co/org/base/blob/main/LICENSE",
    }


def test_a_folder_of_the_cache_has_an_id(tmp_path):
    folder = tmp_path / "models--org--a-b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    assert find_base_model(str(folder)).id == "org/a-b"
    assert find_base_model("").id is None
    assert find_base_model(str(tmp_path / "gone")).id is None


def test_a_checkpoint_of_the_hub_that_is_saved_again_keeps_its_card(compressed, hub, tmp_path):
    save(compressed, tmp_path / "one")
    path = tmp_path / "one" / "README.md"
    names = "base_model: org/base\nbase_model_relation: quantized\n"
    path.write_text(path.read_text().replace("---\n", f"---\n{names}", 1))
    push(tmp_path / "one", "alice/one")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN)
    with patch_attr(model.config, "_name_or_path", "alice/one"):
        save(model, tmp_path / "two")
    again = (tmp_path / "two" / "README.md").read_text()
    assert again.count("base_model") == 2
    assert "base_model: org/base\n" in again
    for name in ("creation", "measured"):
        assert read_section(again, name) == read_section(path.read_text(), name) != ""


def test_an_id_is_looked_up_on_the_hub(hub):
    hub.repos["org/base"] = Repo(private=False)
    hub.repos["org/base"].branches["main"].append({"README.md": BASE_CARD.encode()})
    for _ in range(2):  # from the cache, then
        found = find_base_model("org/base")
        assert (found.id, found.license["license_name"]) == ("org/base", "some-license")
    assert sum("README.md" in one for one in hub.requests) == 2  # HEAD and GET
    hub.repos["org/bare"] = Repo(private=False)
    assert find_base_model("org/bare").id == "org/bare"


def test_without_a_network_nothing_hangs(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_base_model("org/base").id == "org/base"
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_model, "_SECONDS", 0.5)
    with socket.socket() as silent:  # takes connections, and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        begin = time.monotonic()
        found = find_base_model("org/base")
    assert time.monotonic() - begin < 3
    assert found.id == "org/base" and "cannot be read" in found.problem


@pytest.mark.parametrize(
    ("weights", "inputs", "format", "is_served"),
    [
        ({}, {}, "pack-quantized", True),
        ({"symmetric": False}, {}, "pack-quantized", False),
        ({"strategy": "group", "group_size": 16}, {}, "pack-quantized", False),
        ({"strategy": "group", "group_size": 16}, {}, "int-quantized", True),
        ({}, {"dynamic": False, "strategy": "tensor"}, "pack-quantized", False),
        ({}, {"dynamic": False, "strategy": "tensor", "num_bits": 4}, "int-quantized", False),
    ],
    ids=["w4a8", "asymmetric", "groups", "vllm's own", "static", "w4a4"],
)
def test_kernels_are_those_that_serve_the_scheme(weights, inputs, format, is_served):
    """The plugin refuses the others"""
    config = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]
    config["transform_config"]["sha256"] = None
    for group in config["config_groups"].values():
        group["format"] = f"cat-modifier/{format}"
        group["weights"] |= {"num_bits": 4, "strategy": "channel"} | weights
        group["input_activations"] |= {"num_bits": 8, "symmetric": False} | inputs
    (first, *_) = describe_schemes(config).products
    if is_served:
        assert first == (
            "x86 CPU",
            "exact int8 products, of weights that stay packed in 4 bits",
        )
    else:
        assert first[0] == "any" and "nothing in vLLM: integers of fewer than 8" in first[1]
