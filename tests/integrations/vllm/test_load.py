# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` under load, and after one of its processes is killed"""

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ENVIRONMENT
from openai import AsyncOpenAI

REQUESTS = 200
AT_ONCE = 16
MODEL = "model"
PROMPTS = ["The capital of France is", "Water is", "One, two, three,"]
WORDS = "the quick brown fox jumps over a lazy dog and asks why water is blue".split()


@contextmanager
def server(model: Path, log: Path):
    """Start `vllm serve` with a separate engine process; give its URL and process"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--served-model-name", MODEL]
    command += ["--max-model-len", "512", "--max-num-seqs", str(AT_ONCE)]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"no answer after 300 s: {log.read_text()}")
        yield url, process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def family(process: subprocess.Popen) -> dict[int, str]:
    """List a process and its descendants: names by id"""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text().rpartition(")")
        except OSError:
            continue
        number, _, name = head.partition(" (")
        parents[int(number)], names[int(number)] = int(tail.split()[1]), name
    members = [process.pid]
    for member in members:
        members += [number for number, parent in parents.items() if parent == member]
    return {number: names[number] for number in members}


def resident_memory(process: subprocess.Popen) -> int:
    """Compute the resident memory of a server and its child processes, in bytes"""
    return sum(
        int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for number in family(process)
    )


async def complete(client: AsyncOpenAI, prompt: str, tokens: int = 16) -> str:
    answer = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0
    )
    return answer.choices[0].text


async def stream(client: AsyncOpenAI, prompt: str, tokens: int, stop_after: int | None) -> int:
    """
    :param stop_after: tokens after which the client goes away; None to stay
    :return: pieces which came
    """
    pieces = 0
    answer = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
    )
    async for piece in answer:
        pieces += bool(piece.choices)
        if pieces == stop_after:
            await answer.close()
            break
    return pieces


async def load(client: AsyncOpenAI, count: int, seed: int):
    """Requests of mixed lengths: answered at once, streamed, and left by their clients"""
    choose = random.Random(seed)
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one(number: int):
        prompt = " ".join(choose.choices(WORDS, k=choose.choice([1, 8, 60, 250])))
        tokens = choose.choice([1, 4, 12])
        async with at_once:
            if number % 3 == 0:
                assert isinstance(await complete(client, prompt, tokens), str)
            elif number % 3 == 1:
                assert await stream(client, prompt, tokens, None) > 0
            else:
                await stream(client, prompt, 100, stop_after=2)

    await asyncio.gather(*(one(number) for number in range(count)))


async def under_load(url: str, process: subprocess.Popen) -> list[str]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    before = [await complete(client, prompt) for prompt in PROMPTS]
    await load(client, REQUESTS // 2, seed=0)
    memory = resident_memory(process)
    await load(client, REQUESTS // 2, seed=1)
    grown = resident_memory(process) - memory
    assert grown < 0.05 * memory, f"{grown} bytes more than {memory}"
    for _ in range(60):  # vLLM aborts abandoned requests in the background
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
        running = re.findall(r"^vllm:num_requests_running\S* (\S+)$", metrics, re.MULTILINE)
        assert running
        if sum(map(float, running)) == 0:
            break
        await asyncio.sleep(1)
    # alone in the batch again: vLLM repeats results only for equal batches
    assert [await complete(client, prompt) for prompt in PROMPTS] == before
    return before


def test_hundreds_of_requests_and_a_killed_worker(checkpoints, tmp_path):
    model = checkpoints / "smollm2-w4a4"
    with server(model, tmp_path / "first.log") as (url, process):
        answers = asyncio.run(under_load(url, process))
        assert all(answers)
        workers = [number for number, name in family(process).items() if "Worker" in name]
        assert workers, family(process)
        os.kill(workers[0], signal.SIGKILL)
        process.wait(timeout=60)  # the server ends, so that a supervisor can restart it
    log = (tmp_path / "first.log").read_text()
    assert "PackedInt4Kernel for W4A4" in log

    async def ask(url: str) -> list[str]:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
        return [await complete(client, prompt) for prompt in PROMPTS]

    with server(model, tmp_path / "second.log") as (url, _):
        assert asyncio.run(ask(url)) == answers
