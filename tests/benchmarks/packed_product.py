# SPDX-License-Identifier: Apache-2.0
"""
Time the product of packed 4-bit weights against oneDNN's int8 product, on a CPU.

Both are timed in turn, round after round, so that the machine's changes of speed meet both.
Each call reads another copy of the weights, of more copies than the last-level cache holds.
Both are called as a layer in vLLM calls them, with zero points, in bfloat16. With a single
token, a copy of memory (bytes read and written) and the maximum of bytes (read alone) are timed
in turn, too. Runs in the serve environment.

    python tests/benchmarks/packed_product.py --json FILE
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from torch.nn import Module, Parameter

from cat_modifier.integrations.vllm.kernels import OneDNNInt8Kernel, PackedInt4Kernel
from cat_modifier.kernels.native import why_unavailable
from cat_modifier.kernels.ops import quantize

# name: inputs and outputs of the Linears as vLLM merges them
SHAPES = {
    "1B qkv": (2048, 3072),
    "1B o": (2048, 2048),
    "1B gate_up": (2048, 16384),
    "1B down": (8192, 2048),
    "8B qkv": (4096, 6144),
    "8B o": (4096, 4096),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
}
KERNELS = {"packed": PackedInt4Kernel, "oneDNN": OneDNNInt8Kernel}
_BYTES_OF_A_WEIGHT = {"packed": 0.5, "oneDNN": 1}

_PASS = 0.02
"""Seconds of calls between two readings of the clock"""

_MEMORY = 2**28
"""Bytes to copy, or to read"""


def make_layers(kind: str, inputs: int, outputs: int, cached: int) -> list:
    """Make copies of a layer, of more bytes than ``cached``"""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (outputs, inputs), generator=generator).to(torch.int8)
    copies = max(2, -(-cached // int(weight.numel() * _BYTES_OF_A_WEIGHT[kind])))
    layers = []
    for _ in range(copies):
        layer, kernel = Module(), KERNELS[kind]("weight", False, torch.bfloat16)
        layer.weight = Parameter(weight.clone(), requires_grad=False)
        layer.weight_scale = Parameter(torch.full((outputs, 1), 0.01), requires_grad=False)
        kernel.process_weights(layer, layer.weight.data)
        layers.append((kernel, layer))
    return layers


def in_turn(layers: list, operands: tuple) -> Callable[[], torch.Tensor]:
    """Make a function that calls the next layer each time"""
    turns = cycle(layers)

    def call():
        kernel, layer = next(turns)
        return kernel.apply(layer, *operands, None)

    return call


def measure(functions: dict[str, Callable], rounds: int, clock) -> dict[str, list[float]]:
    """Take seconds of a call, of each function in each round"""

    def seconds(function: Callable, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    calls = {k: max(1, int(_PASS / seconds(f, 1))) for k, f in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, calls[name]))
    return times


def summary(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": median(values), "minimum": min(values), "maximum": max(values)}


def compare(
    layers: dict, inputs: int, outputs: int, tokens: int, memory, rounds, clock
) -> dict:
    """
    :param memory: two tensors of ``_MEMORY`` bytes
    :return: seconds of each product, their ratio, and shares of the bandwidths
    """
    operands = quantize(torch.randn(tokens, inputs), 4, False)
    functions = {kind: in_turn(layers[kind], operands) for kind in KERNELS}
    if not torch.equal(*(function() for function in functions.values())):
        raise SystemExit("The products differ")
    if tokens == 1:
        source, target = memory
        functions |= {"copy": lambda: target.copy_(source), "read": lambda: source.amax()}
    times = measure(functions, rounds, clock)
    packed = times["packed"]
    row = {kind: summary(times[kind]) for kind in KERNELS}
    row["ratio"] = summary(a / b for a, b in zip(packed, times["oneDNN"], strict=True))
    for name, moved in (("copy", 2 * _MEMORY), ("read", _MEMORY)):
        if name in times:
            rates = [inputs * outputs / 2 / one for one in packed]
            bandwidths = [moved / one for one in times[name]]
            row[f"{name}, bytes/s"] = summary(bandwidths)
            shares = (a / b for a, b in zip(rates, bandwidths, strict=True))
            row[f"share of {name}"] = summary(shares)
    return row


def describe(row: dict) -> str:
    ratio = row["ratio"]
    text = (
        f"packed {row['packed']['median'] * 1e6:.0f} us, "
        f"oneDNN {row['oneDNN']['median'] * 1e6:.0f} us, ratio {ratio['median']:.2f} "
        f"({ratio['minimum']:.2f} to {ratio['maximum']:.2f})"
    )
    for name in ("copy", "read"):
        if (share := row.get(f"share of {name}")) is not None:
            rate = row[f"{name}, bytes/s"]["median"]
            text += f", {share['median']:.0%} of {name} ({rate / 1e9:.0f} GB/s)"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 256, 1024])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cached-mb", type=int, default=96, help="more than the cache holds")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time on the CPU, of a thread in the mean: for machines with other load",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if reason := why_unavailable():
        raise SystemExit(reason)
    memory = torch.ones(2, _MEMORY, dtype=torch.int8).unbind()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.perf_counter
        if args.cpu_time:
            clock = partial(lambda threads: time.process_time() / threads, threads)
        for name in args.shapes:
            shape = SHAPES[name]
            layers = {kind: make_layers(kind, *shape, args.cached_mb << 20) for kind in KERNELS}
            for tokens in args.tokens:
                row = compare(layers, *shape, tokens, memory, args.rounds, clock)
                rows.append({"threads": threads, "shape": name, "tokens": tokens} | row)
                print(
                    f"{name}, {tokens} tokens, {threads} threads: {describe(row)}", flush=True
                )
    if args.json:
        info = Path("/proc/cpuinfo").read_text()
        result = {
            "cpu": re.search(r"model name\s*: (.*)", info)[1],
            "flags": [f for f in ("avx2", "avx_vnni", "avx512_vnni") if f" {f}" in info],
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "clock": "CPU time" if args.cpu_time else "wall clock",
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
