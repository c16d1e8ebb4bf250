# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier evaluate`"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_data import write_task
from huggingface_hub import parse_eval_result_entries
from transformers import AutoModelForCausalLM, AutoTokenizer
from yaml import safe_load

from cat_modifier.calibration.texts import load_texts, windows
from cat_modifier.evaluate.files import write_entries
from cat_modifier.evaluate.results import Measure, results_table

DATA = ("--dataset", "chats.jsonl", "--samples", "6", "--length", "64")


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder with a task of four choices; no network"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_task(tmp_path / "tasks")
    return tmp_path / "tasks"


def test_text_measures_are_those_of_the_definition(folder, checkpoint, command, tmp_path):
    file = tmp_path / "results.json"
    table = command("evaluate", "checkpoint", "--base", "model", *DATA, "--output", file)
    written = json.loads(file.read_text())
    found = {one["name"].partition(",")[0]: one for one in written["measures"]}

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = load_texts(str(folder / "chats.jsonl"), "train", None, tokenizer)
    ids = windows(texts, tokenizer, 64, 6)
    expected, quantized = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval()
        for name in ("model", "checkpoint")
    )
    with torch.no_grad():
        p, q = (
            torch.stack([one(row[None]).logits[0, :-1].float() for row in ids]).log_softmax(-1)
            for one in (expected, quantized)
        )
    labels = ids[:, 1:, None]
    losses = -q.gather(-1, labels)[..., 0].double().mean(-1)
    perplexity = found["perplexity"]
    assert perplexity["value"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    error = losses.std().item() / math.sqrt(len(ids)) * perplexity["value"]
    assert perplexity["error"] == pytest.approx(error, rel=1e-3)
    base = -p.gather(-1, labels)[..., 0].double().mean()
    assert perplexity["base"] == pytest.approx(base.exp().item(), rel=1e-4)
    assert perplexity["recovery"] == pytest.approx(perplexity["base"] / perplexity["value"])
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    divergence = divergence.item() / labels.numel()
    assert found["KL divergence"]["value"] == pytest.approx(divergence, rel=1e-3)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["top-1 agreement"]["value"] == pytest.approx(agreement)

    assert {"cat-modifier", "torch", "transformers"} <= written["versions"].keys()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| perplexity")]
    assert rows[0][3].strip().startswith(f"{perplexity['value']:.2f} +- ")


def test_a_card_has_no_folders_of_the_machine(folder, checkpoint, command):
    data = (*DATA, "--dataset", folder / "chats.jsonl")
    command("evaluate", checkpoint, "--base", folder / "model", *data)
    card = (checkpoint / "README.md").read_text()
    assert "| perplexity, chats.jsonl " in card and "base: model; " in plain_text(card)
    assert str(folder) not in plain_text(card)


def plain_text(markdown: str) -> str:
    return re.sub(r"\\(.)", r"\1", markdown)


def test_a_model_is_as_good_as_itself(folder, command):
    table = command("evaluate", "model", "--base", "model", *DATA)
    assert re.search(r"perplexity.*100\.0%", table)
    assert re.search(r"KL divergence.* 0\.0000 \+- 0\.0000", table)
    assert re.search(r"top-1 agreement.* 1\.0000 \+- 0\.0000", table)
    assert not (folder / "model" / ".eval_results").exists()


def test_without_a_base_there_is_one_column(folder, command):
    table = command("evaluate", "model", *DATA)
    header = next(line for line in table.splitlines() if line.startswith("| measure"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["measure", "this"]


@pytest.mark.slow
def test_a_task_of_lm_eval_is_measured_and_written(checkpoint, command, task, tmp_path):
    file = tmp_path / "results.json"
    table = command(
        *("evaluate", "checkpoint", "--base", "model", "--samples", "0", "--tasks", "words"),
        *("--include-path", task, "--output", file),
    )
    found = {one["name"]: one for one in json.loads(file.read_text())["measures"]}
    assert set(found) == {"words, acc", "words, acc_norm"}
    assert all(0 <= one["value"] <= 1 and one["error"] > 0 for one in found.values())
    assert all(one["higher_is_better"] for one in found.values())
    assert "| words, acc " in table

    card = (checkpoint / "README.md").read_text()
    for part in ("| words, acc ", "\\-\\-model hf", "cat\\-modifier ", "lm\\-eval "):
        assert part in card
    assert not (checkpoint / ".eval_results").exists()  # the Hub does not know this dataset
    assert "is the checkpoint that was saved" in command("verify", "checkpoint")


@pytest.mark.slow
def test_patterns_and_tags_show_all_of_their_tasks(command, task):
    """A tag has no result of its own, a group has, and its members are left out"""
    text = (task / "words.yaml").read_text()
    for name, tag in (
        ("more", "tagged"),
        ("other", "tagged"),
        ("inside", "none"),
        ("listed", "none"),
    ):
        content = text.replace("task: words", f"task: {name}\ntag: {tag}")
        (task / f"{name}.yaml").write_text(content)
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (task / "group.yaml").write_text(f"group: words_of_all\ntask: [inside]\n{mean}")
    (task / "list.yaml").write_text("group: no_number\ntask: [listed]\n")
    table = command(
        *("evaluate", "model", "--samples", "0"),
        *("--tasks", "wor*,tagged,words_of_all,no_number"),
        *("--include-path", task, "--limit", "2"),
    )
    rows = {line.split("|")[1].partition(",")[0].strip() for line in table.splitlines()[2:]}
    assert {"words", "more", "other", "words_of_all", "listed"} == rows - {""}


def test_the_hub_gets_what_it_can_relate_to_a_dataset(tmp_path, monkeypatch):
    """Of results as lm-eval returns them"""
    from cat_modifier.evaluate.tasks import _collect  # needs lm-eval

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    paths = {"hub": "owner/data", "file": "json", "local": "folder", "script": "one.py"}
    numbers = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "one"}
    found = {
        "results": {name: numbers for name in (*paths, "group")},
        "configs": {name: {"dataset_path": path} for name, path in paths.items()},
        "higher_is_better": {},
    }
    write_entries(tmp_path, _collect(found, None, list(found["results"])), "--model hf")
    (file,) = (tmp_path / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("owner/data", "hub", 0.5)
    assert entry.notes == "hub, acc; --model hf"


def test_the_base_of_a_task_that_it_cannot_do_is_no_recovery():
    assert Measure("task", 0.5, base=0.0, higher_is_better=True).recovery is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--samples", "0"], "nothing to evaluate"),
        (["--output", "no/such/folder/results.json"], "There is no folder for"),
        (["--base", "./nope"], "There is no folder ./nope"),
        (["--include-path", "nope"], "'nope' does not exist"),
    ],
)
def test_misuse_is_one_line(folder, command, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        command("evaluate", "model", "--dataset", "chats.jsonl", *arguments)
    error = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


@pytest.mark.slow
def test_an_unknown_task_is_one_line(command, task):
    with pytest.raises(SystemExit, match="no task nope: .*--include-path"):
        command(
            "evaluate",
            "model",
            "--samples",
            "0",
            "--tasks",
            "words,nope",
            "--include-path",
            task,
        )


def test_a_missing_library_names_the_extra(command, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'cat-modifier\[evaluate\]'"):
        command("evaluate", "model", "--tasks", "words")


def test_a_table_is_markdown_with_recovery_and_errors():
    table = results_table(
        [
            Measure("perplexity, a|b", 20.0, 0.5, 10.0, 0.25, higher_is_better=False),
            Measure("KL divergence", 0.125, math.nan),
            Measure("task, acc", 0.6, 0.01, 0.8, None, higher_is_better=True),
        ]
    )
    rows = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in table.splitlines()]
    assert rows[0] == ["measure", "base", "this", "recovery"]
    assert rows[2] == ["perplexity, a\\|b", "10.00 +- 0.25", "20.00 +- 0.50", "50.0%"]
    assert rows[3] == ["KL divergence", "", "0.1250", ""]
    assert rows[4] == ["task, acc", "0.8000", "0.6000 +- 0.0100", "75.0%"]


def test_the_table_of_the_quickstart(folder, command):
    """examples/compare.py, of what the command writes"""
    for name, base in (("one", []), ("again", ["--base", "model"])):
        shutil.copytree(folder / "model", folder / name)
        command("evaluate", name, *base, "--output", f"{name}.json", *DATA)
    script = Path(__file__).parents[2] / "examples" / "compare.py"
    arguments = [sys.executable, str(script), "model", "one", "again"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=folder)
    perplexity = json.loads((folder / "one.json").read_text())["measures"][0]["value"]
    size = (folder / "model" / "model.safetensors").stat().st_size
    head, _, *rows = [line.split("|")[1:-1] for line in run.stdout.splitlines()]
    assert "held-out tokens" in head[0]
    assert len(rows) == 3 and rows[2][0].strip() == "again"
    for row in rows:
        assert [cell.strip() for cell in row[1:]] == [f"{perplexity:.2f}", f"{size / 1e6:.0f}"]
