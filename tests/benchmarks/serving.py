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
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SIDES = ("bf16", "W8A8", "W4A16", "W4A4", "W4A4-Hadamard", "W4A4-CAT", "W4A4-CAT-32")
BASE = "W4A4"

# name: (prompts, tokens of each, tokens to generate)
PREFILL = {"prefill, 1 x 512": (1, 512), "prefill, 4 x 512": (4, 512)}
DECODE = {"decode, 1": (1, 64), "decode, 16": (16, 32)}


def serve(folder: str, is_compiled: bool, takes_cpu_time: bool):
    """The process of one model: answers a name of what to time by seconds per token"""
    clock = time.process_time if takes_cpu_time else time.perf_counter
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        folder,
        dtype="bfloat16",
        # vLLM itself has no kernel for the activations of stock W4A4 checkpoints
        quantization="cat-modifier" if Path(folder).name == BASE else None,
        enforce_eager=not is_compiled,
        max_model_len=1024,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    started = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    memory = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", status))

    def generate(count: int, length: int, tokens: int) -> float:
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 1000, (count, length), generator=generator).tolist()
        prompts = [{"prompt_token_ids": row} for row in ids]
        start = clock()
        llm.generate(prompts, params, use_tqdm=False)
        return clock() - start

    def measure(name: str) -> float:
        if name in PREFILL:
            count, length = PREFILL[name]
            return generate(count, length, 1) / (count * length)
        count, tokens = DECODE[name]
        prefill = generate(count, 16, 1)
        return (generate(count, 16, 1 + tokens) - prefill) / (count * tokens)

    for name in (*PREFILL, *DECODE):  # to warm up
        measure(name)
    answer = {
        "start-up, s": started,
        "resident memory, GB": int(memory["VmRSS"]) / 2**20,
        "peak memory, GB": int(memory["VmHWM"]) / 2**20,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    while True:
        print(f"\nanswer {json.dumps(answer)}", flush=True)
        name = sys.stdin.readline().strip()
        if not name:
            os._exit(0)
        answer = measure(name)


class Server:
    def __init__(self, folder: Path, options: list[str], log: Path):
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder), "--serve", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment | os.environ,
            text=True,
        )
        self.facts = self._answer()

    def measure(self, name: str) -> float:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"vLLM stopped: see {self.log}")


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
    servers = {}
    for side in dict.fromkeys((*args.sides, BASE)):
        print(f"Starting {side}", file=sys.stderr)
        servers[side] = Server(args.folder / side, options, args.folder / f"{side}.log")
    seconds = {side: {name: [] for name in (*PREFILL, *DECODE)} for side in servers}
    for number in range(args.rounds):
        print(f"Round {number + 1} of {args.rounds}", file=sys.stderr)
        for name in (*PREFILL, *DECODE):
            for side, server in servers.items():
                seconds[side][name].append(server.measure(name))

    result: dict = {"model": args.folder.name, "compiled": args.compiled}
    result |= {"cpu time": args.cpu_time, "sides": {}}
    for side, server in servers.items():
        facts = server.facts
        result["versions"], result["threads"] = facts.pop("versions"), facts.pop("threads")
        result["sides"][side] = facts | {
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
