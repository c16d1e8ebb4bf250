# SPDX-License-Identifier: Apache-2.0
"""
Speed of vLLM on a GPU, of configs alone: weights are made up.

    python tests/benchmarks/serving_gpu.py FOLDER [--json FILE]

FOLDER is made by `make_gpu_configs.py`: one folder with `config.json` for each side.
All sides start at once, each in a process of its own, and are then timed in turn, round after
round.
"""

import argparse
import json
import re
import time
from pathlib import Path
from statistics import median

from model_process import ModelProcess, answer_questions, start_model, time_generation

SIDES = {
    # side: (folder, options)
    "bf16": ("bf16", {}),
    "W8A8": ("W8A8", {}),
    "W4A16": ("W4A16", {}),
    # vLLM itself has no kernel for the activations of stock W4A4 checkpoints
    "W4A4": ("W4A4", {"quantization": "cat-modifier"}),
    "Hadamard": ("W4A4-Hadamard", {}),
    "CAT": ("W4A4-CAT", {}),
    "CAT-32": ("W4A4-CAT-32", {}),
    "CAT-int4": ("W4A4-CAT", {"additional_config": {"cat_weights": "int4"}}),
}
BASE = "W4A4"

# name: (prompts, tokens of each, tokens to generate)
WORK = {
    "prefill, 1 x 512": (1, 512, 1),
    "prefill, 2 x 2048": (2, 2048, 1),
    "decode, 1": (1, 16, 65),
    "decode, 16": (16, 16, 65),
    "decode, 64": (64, 16, 65),
}

SHARED = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1250 * 2**20}
"""Several models share a GPU"""

MODES = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {"compilation_config": {}},
}


def make_weights_up(model):
    """Fill weights of every kind at random: constants would take less power, and time"""
    import torch

    for name, parameter in model.named_parameters():
        data = parameter.data
        if name.endswith(("weight_shape", "weight_g_idx")):
            continue
        if data.dtype == torch.int32:
            data.random_(-(2**31), 2**31)
        elif data.dtype in (torch.int8, torch.uint8):
            data.random_(*((-100, 100) if data.dtype == torch.int8 else (0, 255)))
        elif name.endswith("weight_scale"):
            data.fill_(2e-3)
        elif "norm" in name:
            data.fill_(1)
        elif data.is_floating_point():
            data.normal_(0, 0.02)


def serve(folder: str, options: dict):
    """The process of one side: answers a name of WORK by seconds"""
    import torch
    import vllm
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load_weights = DummyModelLoader.load_weights

    def load(loader, model, model_config):
        load_weights(loader, model, model_config)
        make_weights_up(model)

    DummyModelLoader.load_weights = load
    llm, started = start_model(
        model=folder,
        load_format="dummy",
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        **options,
    )

    def generate(count: int, length: int, tokens: int) -> float:
        return time_generation(llm, count, length, tokens, time.perf_counter)

    def measure(name: str) -> float:
        """Seconds of a prefill, or of one step of decoding"""
        count, length, tokens = WORK[name]
        if tokens == 1:
            return generate(count, length, 1)
        return (generate(count, length, tokens) - generate(count, length, 1)) / (tokens - 1)

    for name in WORK:  # to warm up
        measure(name)
        measure(name)
    is_cuda = torch.cuda.is_available()
    facts = {
        "start-up, s": started,
        "memory, GB": torch.cuda.memory_allocated() / 1e9 if is_cuda else 0,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
    }
    answer_questions(facts, measure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--mode", default="graphs", choices=MODES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", type=json.loads, default={}, help="of vLLM, JSON")
    parser.add_argument("--seconds", type=float, default=600, help="no round after these")
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(str(args.folder), args.serve)

    start = time.perf_counter()
    logs = args.logs or args.folder
    logs.mkdir(parents=True, exist_ok=True)
    servers = {}
    for side in args.sides:
        name, options = SIDES[side]
        options = SHARED | MODES[args.mode] | options | args.options
        log = logs / f"{args.folder.name}-{args.mode}-{side}.log"
        command = [__file__, str(args.folder / name), "--serve", json.dumps(options)]
        servers[side] = ModelProcess(command, log, {})
    facts = {}
    for side, server in list(servers.items()):
        try:
            facts[side] = server.answer()
        except RuntimeError as error:
            print(f"{side}: {error}", flush=True)
            del servers[side]
    print(f"{len(servers)} started after {time.perf_counter() - start:.0f} s", flush=True)
    seconds = {side: {name: [] for name in WORK} for side in servers}
    for _ in range(args.rounds):
        if time.perf_counter() - start > args.seconds:
            break
        for name in WORK:
            for side, server in servers.items():
                seconds[side][name].append(server.ask(name))

    result = {"model": args.folder.name, "mode": args.mode, "sides": {}}
    for side, server in servers.items():
        log = server.log.read_text()
        kernels = sorted(set(re.findall(r"Using (\w*(?:Kernel|Linear\w*))", log)))
        result["sides"][side] = facts[side] | {"kernels": kernels}
        for name, values in seconds[side].items():
            base = seconds.get(BASE, seconds[side])[name]
            result["sides"][side][name] = {
                "ms": 1e3 * median(values),
                "all": values,
                "time to W4A4": median(a / b for a, b in zip(values, base, strict=True)),
            }
        server.close()
    print(f"{args.folder.name}, {args.mode}: ms (time relative to {BASE})")
    print(f"{'':20}", *(f"{side:>15}" for side in servers))
    for name in WORK:
        cells = (result["sides"][side][name] for side in servers)
        shown = (f"{c['ms']:8.2f} ({c['time to W4A4']:.2f})" for c in cells)
        print(f"{name:20}", *(f"{cell:>15}" for cell in shown))
    for name in ("start-up, s", "memory, GB"):
        print(f"{name:20}", *(f"{result['sides'][side][name]:15.1f}" for side in servers))
    for side in servers:
        print(side, result["sides"][side]["kernels"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
