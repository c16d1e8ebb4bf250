# SPDX-License-Identifier: Apache-2.0
"""
Time the online transform with quantization to 4 bits: fused, unfused, and alternatives.

The roofline is the larger of two times: bytes to move at the measured bandwidth of a copy,
and operations at the measured peak of a matrix product. Runs in the serve environment, on a
GPU if there is one: in CUDA graphs, as vLLM does, with inputs and transforms that are not in
the cache. hadacore is measured where vLLM has it.

    python tests/benchmarks/online_transform.py --json FILE
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.layout import Rotation, TransformLayout, choose_layout
from cat_modifier.functional.stored import dequantize_blocks, store_blocks
from cat_modifier.functional.transform import apply_transform
from cat_modifier.kernels import ops
from cat_modifier.kernels.reference import quantize_per_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16

ROTATIONS = {"blocks": Rotation.BLOCK_HADAMARD, "blocks, Hadamard": Rotation.HADAMARD}
STORED = {"": DTYPE, ", int8": torch.int8}
"""Dtypes of T, by what the names of sides end with"""


def seconds(functions: dict[str, list[Callable]], rounds: int) -> dict[str, float]:
    """
    Take medians over rounds of all functions: the speed of the machine drifts.

    :param functions: by name, the same function of several inputs
    """
    time_one = _time_on_gpu if DEVICE == "cuda" else _time_on_cpu
    timers = {name: time_one(calls) for name, calls in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return {name: median(values) for name, values in times.items()}


def _time_on_cpu(calls: list[Callable]) -> Callable[[], float]:
    (function,) = calls
    function()
    function()
    start = time.perf_counter()
    function()
    repeats = min(200, max(1, int(0.02 / (time.perf_counter() - start))))

    def timer() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats

    return timer


def _time_on_gpu(calls: list[Callable]) -> Callable[[], float]:
    """Capture a graph, so that the time of Python does not count"""
    calls = calls * math.ceil(20 / len(calls))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    return timer


def count_copies(size: int) -> int:
    """
    Count the inputs of one size that a cache does not hold all.

    :param size: bytes of one
    """
    if DEVICE == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(600, math.ceil(3 * cache / size)))


def make_online(layout: TransformLayout, in_features: int, stored: torch.dtype):
    count, size = in_features // layout.stored_size, layout.stored_size
    blocks = torch.empty(count, size, size, device=DEVICE, dtype=stored)
    store_blocks(torch.randn(blocks.shape, device=DEVICE) / size**0.5, blocks)
    hadamard = None
    if layout.online_hadamard_size > 1:
        hadamard = hadamard_matrix(layout.online_hadamard_size).float()
    return ops.OnlineTransform(blocks, hadamard, layout.interleave, DTYPE).to(DEVICE)


def plain(online: ops.OnlineTransform) -> Callable[[Tensor], Tensor]:
    """The transform in plain PyTorch"""
    blocks = dequantize_blocks(online.weight.detach(), DTYPE)
    hadamard = online.hadamard
    hadamard = None if hadamard is None else hadamard * online.norm_scale
    return lambda x: apply_transform(x, blocks, hadamard, online.interleave)


@cache
def find_hadacore() -> bool:
    """Load vLLM's library of operators, without the rest of vLLM"""
    spec = importlib.util.find_spec("vllm")
    if DEVICE == "cpu" or spec is None or spec.origin is None:
        return False
    for library in sorted(Path(spec.origin).parent.glob("_C*.so"), reverse=True):
        try:
            torch.ops.load_library(library)
        except OSError as error:
            print(f"no hadacore: {error}")
        if hasattr(torch.ops._C, "hadacore_transform"):
            return True
    return False


def int8_of_vllm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize symmetrically to 8 bits"""
    q = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_empty((len(x), 1), dtype=torch.float32)
    torch.ops._C.dynamic_scaled_int8_quant(q, x, scales, None)
    return q, scales


def sides(tokens: int, in_features: int, block_size: int) -> dict[str, list[Callable]]:
    layouts = {
        name: choose_layout("x", in_features, 1, block_size, rotation)
        for name, rotation in ROTATIONS.items()
    }
    stored = max(one.stored_size for one in layouts.values())
    # those of int8 are read in half as many bytes
    copies = count_copies(in_features * (2 * tokens + stored))
    shape = (copies, tokens, in_features)
    inputs = list(torch.randn(shape, device=DEVICE, dtype=DTYPE))
    result = {}

    def add(name: str, function: Callable, *arguments: list):
        result[name] = [
            lambda values=values: function(*values)
            for values in zip(inputs, *arguments, strict=True)
        ]

    add("quantization alone", lambda x: ops.quantize(x, 4, False))
    for name, layout in layouts.items():
        for ending, dtype in STORED.items():
            transforms = [make_online(layout, in_features, dtype) for _ in inputs]
            add(f"fused: {name}{ending}", lambda x, t: t.quantize(x, 4, False), transforms)
            if ending:
                continue
            unfused = f"unfused: {name}"
            add(unfused, lambda x, t: ops.quantize(t(x), 4, False), transforms)
            functions = [plain(one) for one in transforms]
            add(
                f"torch.bmm, separate quantization: {name}",
                lambda x, t: quantize_per_token(t(x), 4, False),
                functions,
            )
            add(
                f"torch.bmm, quantization in one kernel: {name}",
                lambda x, t: ops.quantize(t(x), 4, False),
                functions,
            )
    # as before output projections of attention, whose blocks are fused into v_proj
    layout = layouts["blocks, Hadamard"]
    hadamard = hadamard_matrix(layout.online_hadamard_size).float()
    alone = ops.OnlineTransform(None, hadamard, layout.interleave, DTYPE).to(DEVICE)
    add("fused: Hadamard alone", lambda x: alone.quantize(x, 4, False))
    if in_features <= 8192:
        count = count_copies(2 * in_features**2)
        dense = torch.randn(count, in_features, in_features, device=DEVICE, dtype=DTYPE)
        dense = [dense[i % count] for i in range(copies)]
        add("dense d x d product", lambda x, weight: x @ weight, dense)
    if find_hadacore():
        add("int8 quantization of vLLM alone", int8_of_vllm)
        if in_features & (in_features - 1) == 0:
            # in place: apart from the others' inputs
            rotated = [x.clone() for x in inputs]
            hadacore = torch.ops._C.hadacore_transform
            add("hadacore", lambda _, x: hadacore(x, True), rotated)
            add(
                "hadacore, int8 quantization of vLLM",
                lambda _, x: int8_of_vllm(hadacore(x, True)),
                rotated,
            )
    return result


def measure_peaks() -> tuple[float, float]:
    """Measure bytes/s of a copy, read and written, and multiply-adds/s of a bf16 product"""
    source = torch.empty(2**28 if DEVICE == "cpu" else 2**32, dtype=torch.uint8, device=DEVICE)
    target, size = torch.empty_like(source), 4096 if DEVICE == "cpu" else 8192
    a: Tensor = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    functions: dict[str, list[Callable]] = {
        "copy": [lambda: target.copy_(source)],
        "product": [lambda: a @ a],
    }
    times = seconds(functions, 3)
    return 2 * source.numel() / times["copy"], size**3 / times["product"]


def roofline(
    tokens: int,
    in_features: int,
    layout: TransformLayout,
    stored: torch.dtype,
    bandwidth: float,
    peak: float,
) -> float:
    moved = tokens * (in_features * (2 + 1) + 8)
    moved += stored.itemsize * in_features * layout.stored_size
    operations = tokens * layout.multiply_adds(in_features)
    return max(moved / bandwidth, operations / peak)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 4096])
    parser.add_argument("--in-features", nargs="+", type=int, default=[2048, 4096, 8192, 14336])
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    bandwidth, peak = measure_peaks()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}: copy {bandwidth / 1e9:.0f} GB/s, bf16 {2 * peak / 1e12:.2f} TFLOP/s")
    rows = []
    for in_features in args.in_features:
        for block_size in args.block_sizes:
            for tokens in args.tokens:
                with torch.inference_mode():
                    times = seconds(sides(tokens, in_features, block_size), args.rounds)
                row = {"tokens": tokens, "d": in_features, "k": block_size}
                for kind, rotation in ROTATIONS.items():
                    layout = choose_layout("x", in_features, 1, block_size, rotation)
                    for ending, stored in STORED.items():
                        arguments = (tokens, in_features, layout, stored, bandwidth, peak)
                        share = roofline(*arguments) / times[f"fused: {kind}{ending}"]
                        row[f"share of the roofline: {kind}{ending}"] = share
                rows.append(row | {"microseconds": {k: v * 1e6 for k, v in times.items()}})
                shown = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in times.items())
                share = row["share of the roofline: blocks, Hadamard"]
                print(
                    f"d {in_features}, k {block_size}, {tokens} tokens, us: {shown}; "
                    f"{share:.0%} of the roofline",
                    flush=True,
                )
    if args.json:
        result = {
            "device": name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "copy, bytes/s": bandwidth,
            "product, multiply-adds/s": peak,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
