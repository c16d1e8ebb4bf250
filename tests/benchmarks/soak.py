# SPDX-License-Identifier: Apache-2.0
"""
Serve a model and its quantized checkpoint under the same mixed load, round after round:
resident memory after each round, errors, and whether greedy answers are those of before.
Runs in the serve environment, for about a minute a round and model on 2 cores:

    python tests/benchmarks/soak.py output/smollm2-135m-instruct output/w4a4 --rounds 8
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from openai import AsyncOpenAI

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "integrations" / "vllm"), str(ROOT / "tests")]

from test_load import PROMPTS, complete, load, resident_memory, server  # noqa: E402


async def soak(url: str, process, rounds: int, requests: int) -> dict:
    """
    Send rounds of requests. An error of any ends the run.

    :return: `memory` before and after each round, MB, and whether `same_answers` came after
    """
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    before = [await complete(client, prompt) for prompt in PROMPTS]
    memory = [resident_memory(process) / 1e6]
    for seed in range(rounds):
        await load(client, requests, seed)
        memory.append(resident_memory(process) / 1e6)
        print(f"round {seed + 1}: {memory[-1]:.0f} MB ({memory[-1] - memory[-2]:+.0f})")
    # alone in the batch again: vLLM repeats results only for equal batches
    await asyncio.sleep(10)
    after = [await complete(client, prompt) for prompt in PROMPTS]
    return {"memory": [round(one) for one in memory], "same_answers": after == before}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100, help="requests a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for model in arguments.models:
        print(f"{model.name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            with server(model, Path(folder) / "log") as (url, process):
                measured = soak(url, process, arguments.rounds, arguments.requests)
                results[model.name] = asyncio.run(measured)
        print(results[model.name], flush=True)
    if arguments.json:
        content = {"requests": arguments.requests, "models": results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
