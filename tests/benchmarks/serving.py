# SPDX-License-Identifier: Apache-2.0
"""
vLLM end to end: prefill and decode tokens/s, start-up time and memory of a model in
bfloat16 and quantized in several ways, and the ratio of each to W4A4 without a transform.

One process holds each model. They are timed in turn, round after round, so that the
machine's changes of speed meet all of them. Runs in the serve environment, on what
make_serving_models.py has made.

    python tests/benchmarks/serving.py FOLDER --json FILE
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from statistics import median

from model_process import ModelProcess, answer_questions, start_model, time_generation

SIDES = (
    "bf16",
    "W8A8",
    "W4A16",
    "W4A4",
    "W4A4-Hadamard",
    "W4A4-CAT",
    "W4A4-CAT-W8A8-head",
    "W4A4-CAT-32",
)
BASE = "W4A4"

# name: (prompts, tokens of each, tokens to generate)
PREFILL = {"prefill, 1 x 512": (1, 512), "prefill, 4 x 512": (4, 512)}
DECODE = {"decode, 1": (1, 64), "decode, 16": (16, 32)}

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "passive"}


def serve(folder: str, is_compiled: bool, takes_cpu_time: bool):
    """The process of one model: answers a name of what to time by seconds per token"""
    clock = time.process_time if takes_cpu_time else time.perf_counter
    import torch
    import vllm

    llm, started = start_model(
        model=folder,
        # vLLM itself has no kernel for the activations of stock W4A4 checkpoints
        quantization="cat-modifier" if Path(folder).name == BASE else None,
        enforce_eager=not is_compiled,
        max_model_len=1024,
        max_num_batched_tokens=2048,
    )
    status = Path("/proc/self/status").read_text()
    memory = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", status))

    def measure(name: str) -> float:
        if name in PREFILL:
            count, length = PREFILL[name]
            return time_generation(llm, count, length, 1, clock) / (count * length)
        count, tokens = DECODE[name]
        prefill = time_generation(llm, count, 16, 1, clock)
        both = time_generation(llm, count, 16, 1 + tokens, clock)
        return (both - prefill) / (count * tokens)

    for name in (*PREFILL, *DECODE):  # to warm up
        measure(name)
    facts = {
        "start-up, s": started,
        "resident memory, GB": int(memory["VmRSS"]) / 2**20,
        "peak memory, GB": int(memory["VmHWM"]) / 2**20,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    answer_questions(facts, measure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads: beside other load"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(str(args.folder), args.compiled, args.cpu_time)

    options = ["--compiled"] * args.compiled + ["--cpu-time"] * args.cpu_time
    servers, facts = {}, {}
    for side in dict.fromkeys((*args.sides, BASE)):
        print(f"Starting {side}", file=sys.stderr)
        command = [__file__, str(args.folder / side), "--serve", *options]
        servers[side] = ModelProcess(command, args.folder / f"{side}.log", ENVIRONMENT)
        facts[side] = servers[side].answer()
    seconds = {side: {name: [] for name in (*PREFILL, *DECODE)} for side in servers}
    for number in range(args.rounds):
        print(f"Round {number + 1} of {args.rounds}", file=sys.stderr)
        for name in (*PREFILL, *DECODE):
            for side, server in servers.items():
                seconds[side][name].append(server.ask(name))

    result: dict = {"model": args.folder.name, "compiled": args.compiled}
    result |= {"cpu time": args.cpu_time, "sides": {}}
    for side, server in servers.items():
        result["versions"] = facts[side].pop("versions")
        result["threads"] = facts[side].pop("threads")
        result["sides"][side] = facts[side] | {
            name: {
                "tokens/s": 1 / median(values),
                "time to W4A4": median(
                    value / base
                    for value, base in zip(values, seconds[BASE][name], strict=True)
                ),
            }
            for name, values in seconds[side].items()
        }
        server.close()

    print(f"{'tokens/s (time to W4A4)':24}", *(f"{side:>18}" for side in servers))
    for name in (*PREFILL, *DECODE):
        cells = (result["sides"][side][name] for side in servers)
        shown = (f"{c['tokens/s']:9.1f} ({c['time to W4A4']:.2f})" for c in cells)
        print(f"{name:24}", *(f"{cell:>18}" for cell in shown))
    for name in ("start-up, s", "resident memory, GB", "peak memory, GB"):
        print(f"{name:24}", *(f"{result['sides'][side][name]:18.2f}" for side in servers))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
