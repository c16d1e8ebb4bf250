# SPDX-License-Identifier: Apache-2.0
"""
All that a new user does, from the wheel: quantize a real model, read its card, evaluate,
upload, download and verify it, and serve the download with vLLM.

vLLM cannot be installed beside llm-compressor: CAT_TEST_SERVE names the interpreter of an
environment with vLLM, and the one that runs this test makes the checkpoint.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from command_data import save_task
from hub_server import serve_hub
from huggingface_hub import ModelCard
from installing import ROOT, build_wheel, environment, install_beside, run

pytestmark = pytest.mark.slow

REPO = "alice/SmolLM2-135M-W4A4"
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Russia": "Moscow",
}
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], local_dir=sys.argv[2])
"""


def write_capitals(folder: Path):
    """Write a task of lm-eval that the model can do"""
    choices = [f" {city}" for city in CAPITALS.values()]
    rows = [
        {"question": f"The capital of {country} is", "choices": choices, "answer": index}
        for index, country in enumerate(CAPITALS)
    ]
    save_task(folder, "capitals", rows)


def check_card(folder: Path, base: Path):
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert {"cat-modifier", "compressed-tensors", "vllm", "w4a4", "int4"} <= {*data["tags"]}
    headings = [line[3:] for line in card.text.splitlines() if line.startswith("## ")]
    assert headings[:2] == ["Serve", "Load in Transformers"]
    assert {"Creation", "Measured while it was made"} <= {*headings}
    for part in ("vllm serve MODEL", "CATModifier", "2,048 tokens in 8 samples", "down_proj"):
        assert part in card.text
    assert str(base.parent) not in str(card)  # a folder of this machine is nobody's business


@contextmanager
def serving(python: Path, model: Path, log: Path) -> Iterator[str]:
    """Context with `vllm serve` on a free port; the value is its address"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "model"]
    command += ["--enforce-eager", "--max-model-len", 512]
    with log.open("w") as file:
        server = subprocess.Popen(
            [str(part) for part in command],
            cwd=log.parent,
            env=environment(**VLLM, HF_HUB_OFFLINE="1"),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[
                -4000:
            ]
            try:
                urlopen(f"{url}/health", timeout=2).close()
                break
            except (URLError, TimeoutError):
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # with the process of the engine
        server.wait(60)


def ask(url: str, question: str) -> str:
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "temperature": 0,
    }
    request = Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def table_rows(lines: list[str]) -> list[tuple[str, ...]]:
    """Cells of tables in Markdown, without the rules below their heads"""
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [tuple(map(str.strip, row)) for row in rows if not row[0].startswith(" --")]


def test_a_new_user_goes_from_the_wheel_to_an_answer(tmp_path):
    if not (serve := os.environ.get("CAT_TEST_SERVE")):
        pytest.fail("set CAT_TEST_SERVE to the python of an environment with vLLM")
    wheel = build_wheel(tmp_path)
    compress_python = install_beside(sys.executable, wheel, tmp_path / "compress")
    serve_python = install_beside(serve, wheel, tmp_path / "serve")
    command = compress_python.with_name("cat-modifier")
    for python in (compress_python, serve_python):
        (file,) = run(python, "-c", "import cat_modifier as c; print(c.__file__)", cwd=tmp_path)
        assert Path(file).is_relative_to(python.parents[1])
    model, checkpoint = tmp_path / "original" / "smollm2", tmp_path / "smollm2-w4a4"
    model.parent.mkdir()
    run(compress_python, ROOT / "examples/embedded_model.py", model, cwd=tmp_path)

    lines = run(
        *(command, "quantize", model, "--recipe", "w4a4", "--output", checkpoint),
        *("--samples", 8, "--length", 256),
        cwd=tmp_path,
    )
    assert any(line.startswith("| q_proj/k_proj/v_proj") for line in lines)
    assert f"    cat-modifier evaluate {checkpoint} --base {model}" in lines
    assert not any(" | INFO - " in line for line in lines)  # the log is elsewhere
    check_card(checkpoint, model)

    write_capitals(tmp_path / "tasks")
    lines = run(
        *(serve_python.with_name("cat-modifier"), "evaluate", checkpoint, "--base", model),
        *("--samples", 4, "--length", 128, "--output", "results.json"),
        *("--tasks", "capitals", "--include-path", tmp_path / "tasks", "--model", "vllm"),
        *("--model-args", "enforce_eager=True,max_model_len=128"),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        **VLLM,
    )
    measures = json.loads((tmp_path / "results.json").read_text())["measures"]
    found = {one["name"].partition(", pydoc")[0]: one for one in measures}
    assert {"perplexity", "KL divergence", "top-1 agreement", "capitals, acc"} <= found.keys()
    assert 0.3 < found["perplexity"]["recovery"] < 1
    assert found["capitals, acc"]["base"] == 1
    assert found["capitals, acc"]["value"] >= 4 / 6
    card = (checkpoint / "README.md").read_text()
    assert set(table_rows(lines)) <= set(table_rows(card.splitlines()))
    for conditions in ("4 windows of 128 tokens", r"\-\-model vllm"):
        assert conditions in card

    downloaded = tmp_path / "downloaded"
    with serve_hub() as hub:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_of_alice",
        }
        lines = run(command, "push", checkpoint, REPO, cwd=tmp_path, **variables)
        assert lines[-1] == f"{hub.url}/{REPO}"
        run(serve_python, "-c", DOWNLOAD, REPO, downloaded, cwd=tmp_path, **variables)
    (line,) = run(serve_python.with_name("cat-modifier"), "verify", downloaded, cwd=tmp_path)
    assert line == f"{downloaded} is the checkpoint that was saved"
    assert (downloaded / "README.md").read_text() == card

    log = tmp_path / "serve.log"
    with serving(serve_python, downloaded, log) as url:
        answer = ask(url, "What is the capital of France?")
    assert "Paris" in answer
    assert "activations: 4 bits" in log.read_text()
