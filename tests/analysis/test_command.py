# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier analyze`, and the files that it writes"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from PIL import Image
from tiny_models import VOCABULARY, int_scheme, make_loader, make_model, make_tokens

from cat_modifier import CATModifier
from cat_modifier.analysis.figures import COMPARISON_FIGURES, FIGURES
from cat_modifier.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with a model, and a text that uses its vocabulary"""
    folder = tmp_path_factory.mktemp("command")
    make_model(folder / "model", "llama")
    words = [f"<{i * 7919 % VOCABULARY}>" for i in range(2, 1500)]
    (folder / "text.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the command, and return its output. Raises SystemExit if it fails"""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(folder)
        data = ["--dataset", "text.txt", "--samples", "8", "--length", "64"]
        monkeypatch.setattr(sys, "argv", ["cat-modifier", "analyze", *data, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        if end.value.code:
            raise end.value
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def report(folder):
    """Make a report with all transforms"""
    command = [sys.executable, "-m", "cat_modifier.cli", "analyze", "model"]
    command += ["--dataset", "text.txt", "--samples", "8", "--length", "64"]
    command += ["--output", "report", "--transform-block-size", "16", "--transforms"]
    command += ["none,scaling,hadamard,block-hadamard,cat-scaling,cat,cat-full"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert "Mean measured SQNR, dB" in done.stdout and "report/report.html" in done.stdout
    assert "Calibrating" in done.stderr and "Measuring" in done.stderr
    return folder / "report"


def test_writes_one_row_a_layer_transform_and_scheme(report):
    content = json.loads((report / "layers.json").read_text())
    assert len(content["layers"]) == 14 * 7 * 4
    assert content["settings"]["schemes"] == ["W4A4", "W4A8", "W8A8", "W6A6"]
    with (report / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["layers"])
    for row, expected in zip(rows, content["layers"], strict=True):
        assert row["layer"] == expected["layer"]
        assert float(row["measured_db"]) == pytest.approx(expected["measured_db"], abs=1e-5)
    assert {path.name for path in report.iterdir()} == {*content["files"], "layers.json"}


def test_draws_all_figures(report):
    for name in FIGURES:
        with Image.open(report / f"{name}.png") as image:
            assert min(image.size) > 400
            assert len(image.convert("L").getcolors()) > 10
        svg = (report / f"{name}.svg").read_text()
        assert "dB" in svg  # text is text, with units


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_page_works_in_a_browser_without_a_network(report, tmp_path):
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000"]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{report / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    # scripts have filled the table
    assert f"Showing 1 to 25 of {14 * 7 * 4} entries" in done.stdout
    assert "model.layers.0.self_attn.q_proj" in done.stdout
    assert done.stdout.count("data:image/svg+xml;base64") == len(FIGURES)
    assert "highest with CAT" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    # nothing is loaded from elsewhere
    page = (report / "report.html").read_text()
    assert not re.search(r"<(?:script|img|link)[^>]+(?:src|href)=.?https?:", page)


def test_figures_which_the_data_lacks_are_left_out_and_named(command, folder):
    command("model", "--output", "less", "--schemes", "W4A16", "--transforms", "none")
    page = (folder / "less" / "report.html").read_text()
    assert "6-fewer-bits is left out: it needs the transforms none and cat" in page
    assert not (folder / "less" / "6-fewer-bits.png").exists()
    assert (folder / "less" / "5-alignment.png").exists()


def test_compares_a_checkpoint_with_its_original(command, folder):
    model = make_model(folder / "model", "llama")
    recipe = [CATModifier(transform_block_size=16), QuantizationModifier(**int_scheme(4, 4))]
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens(8, 48)))
    model.save_pretrained(folder / "w4a4")
    for file in (folder / "model").glob("token*"):
        shutil.copy(file, folder / "w4a4")

    printed = command("w4a4", "--original", "model", "--output", "comparison")
    assert "perplexity" in printed and "KL divergence" in printed
    content = json.loads((folder / "comparison" / "layers.json").read_text())
    # all but v_proj and o_proj: a transform is fused between them
    assert len(content["layers"]) == 10
    assert content["kl_divergence"] > 0
    assert content["perplexity"]["original"] > 1
    for name in COMPARISON_FIGURES:
        assert (folder / "comparison" / f"{name}.png").exists()
    assert "of the original" in (folder / "comparison" / "report.html").read_text()

    with pytest.raises(SystemExit, match="name the model it was made from as --original"):
        command("w4a4", "--output", "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--schemes", "int4"], "error: Unknown scheme 'int4'"),
        (["model", "--targets", "Conv2d"], "error: The model has no torch.nn.Linear"),
        (["model", "--original", "model"], "error: model is not quantized"),
        (["model", "--transforms", "cat,fft"], "error: Unknown transform 'fft'.*one of none, "),
    ],
)
def test_bad_input_is_one_line(command, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command(*arguments, "--output", "bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "There is no folder ./nowhere"),
        (["model", "--original", "./nowhere"], "There is no folder ./nowhere"),
        (["model/typo"], "There is no folder model/typo"),
        (["a/path/of/parts"], "There is no folder a/path/of/parts"),
        (["model", "--samples", "0"], "greater than or equal to 1|not in the range x>=1"),
        (["model", "--schemes", "W4A4", "W4A8"], r"unexpected extra argument\(s\) \(W4A8\)"),
    ],
)
def test_misuse_is_exit_code_2_and_names_the_help(command, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        command(*arguments, "--output", "bad")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "--help" in error and "Traceback" not in error


def test_a_model_that_is_neither_here_nor_on_the_hub_is_one_line(folder):
    command = [sys.executable, "-m", "cat_modifier.cli", "analyze", "nowhere"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: There is no folder nowhere, and it could not be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("missing.txt", "The dataset 'missing.txt' cannot be read"),
        ("broken.json", "The dataset 'broken.json' cannot be read"),
        ("table.csv", "The dataset 'table.csv' has neither a column 'text' .*title.*body"),
        ("lists.json", "Column 'text' of the dataset 'lists.json' holds values of type list"),
        ("short.txt", "The texts have . tokens, too few for one window of 64"),
    ],
)
def test_datasets_that_cannot_be_used_are_one_line(folder, monkeypatch, dataset, message):
    (folder / "broken.json").write_text("{")
    (folder / "lists.json").write_text('[{"text": ["a", "b"]}]')
    (folder / "table.csv").write_text("title,body\na,b\n")
    (folder / "short.txt").write_text("<5> <6>")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["model", "--output", "bad", "--dataset", dataset, "--length", "64"]
    monkeypatch.setattr(sys, "argv", ["cat-modifier", "analyze", *arguments])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main()


def test_finished_reports_are_not_replaced_by_accident(command, folder, report):
    before = (report / "layers.json").read_text()
    with pytest.raises(SystemExit, match="holds files"):
        command("model", "--output", "report")
    assert (report / "layers.json").read_text() == before


@pytest.mark.slow
def test_unused_experts_are_named_and_not_in_the_report(command, folder, logs):
    make_model(folder / "moe", "qwen3-moe", num_experts=64, num_experts_per_tok=1)
    arguments = ["moe", "--output", "moe-report", "--schemes", "W4A4", "--samples", "1"]
    command(*arguments, "--transforms", "none,cat")
    assert re.search(r"Linears saw no tokens.*experts\.\d+", "".join(logs))
    page = (folder / "moe-report" / "report.html").read_text()
    assert re.search(r"layers\.0\.mlp\.experts\.\d+\.gate_proj", page)


def test_names_are_no_markup(command, folder):
    shutil.copytree(folder / "model", folder / "<b>model")
    printed = command("<b>model", "--output", "out[red]", "--transforms", "none")
    assert "out[red]/report.html" in printed
    page = (folder / "out[red]" / "report.html").read_text()
    assert "&lt;b&gt;model" in page and "<b>model" not in page
