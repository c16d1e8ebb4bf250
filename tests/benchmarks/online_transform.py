# SPDX-License-Identifier: Apache-2.0
"""
Time the online transform with quantization to 4 bits: fused, unfused, and alternatives.

The roofline is the larger of two times: bytes to move at the measured bandwidth of a copy,
and operations at the measured peak of a matrix product. Runs in the serve environment, on a
GPU if there is one.

    python tests/benchmarks/online_transform.py --json FILE
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from cat_modifier.functional.hadamard import hadamard_matrix
from cat_modifier.functional.layout import Rotation, choose_layout
from cat_modifier.functional.transform import apply_transform
from cat_modifier.kernels import ops
from cat_modifier.kernels.reference import quantize_per_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16


def seconds(functions: dict, rounds: int) -> dict[str, float]:
    """Take medians over rounds of all functions: the speed of the machine drifts"""
    repeats, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        function()
        function()
        _wait()
        start = time.perf_counter()
        function()
        _wait()
        repeats[name] = min(200, max(1, int(0.02 / (time.perf_counter() - start))))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            _wait()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: median(values) for name, values in times.items()}


def _wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def sides(tokens: int, in_features: int, block_size: int) -> dict:
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=DTYPE)
    result = {"quantization alone": lambda: ops.quantize(x, 4, False)}
    for name, rotation in (
        ("blocks", Rotation.BLOCK_HADAMARD),
        ("blocks, Hadamard", Rotation.HADAMARD),
    ):
        layout = choose_layout("x", in_features, 1, block_size, rotation)
        count, size = in_features // layout.stored_size, layout.stored_size
        blocks = torch.randn(count, size, size, device=DEVICE, dtype=DTYPE) / size**0.5
        hadamard = None
        if layout.online_hadamard_size > 1:
            hadamard = hadamard_matrix(layout.online_hadamard_size).to(DEVICE, torch.float32)
        online = ops.OnlineTransform(blocks, hadamard, layout.interleave, DTYPE)
        unfused = None if hadamard is None else hadamard.to(DTYPE)
        result[f"fused: {name}"] = lambda t=online: t.quantize(x, 4, False)
        result[f"unfused: {name}"] = lambda t=online: ops.quantize(t(x), 4, False)
        result[f"torch.bmm, separate quantization: {name}"] = (
            lambda b=blocks, h=unfused, q=layout.interleave: quantize_per_token(
                apply_transform(x, b, h, q), 4, False
            )
        )
    if in_features <= 8192:
        dense = torch.randn(in_features, in_features, device=DEVICE, dtype=DTYPE)
        result["dense d x d product"] = lambda: x @ dense
    if in_features & (in_features - 1) == 0 and DEVICE == "cuda":
        from vllm import _custom_ops

        result["hadacore"] = lambda: _custom_ops.hadacore_transform(x)
    return result


def measure_peaks() -> tuple[float, float]:
    """Measure bytes/s of a copy, read and written, and multiply-adds/s of a bf16 product"""
    source = torch.empty(2**28 if DEVICE == "cpu" else 2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a: Tensor = torch.randn(4096, 4096, device=DEVICE, dtype=DTYPE)
    times = seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, 3)
    return 2 * source.numel() / times["copy"], 4096**3 / times["product"]


def roofline(
    tokens: int, in_features: int, stored: int, online: int, bandwidth: float, peak: float
) -> float:
    moved = tokens * (in_features * (2 + 1) + 8) + 2 * in_features * stored
    operations = tokens * in_features * (stored + (online if online > 1 else 0))
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
                for kind, rotation in (
                    ("blocks", Rotation.BLOCK_HADAMARD),
                    ("blocks, Hadamard", Rotation.HADAMARD),
                ):
                    layout = choose_layout("x", in_features, 1, block_size, rotation)
                    bound = roofline(
                        tokens,
                        in_features,
                        layout.stored_size,
                        layout.online_hadamard_size,
                        bandwidth,
                        peak,
                    )
                    row[f"share of the roofline: {kind}"] = bound / times[f"fused: {kind}"]
                rows.append(row | {"microseconds": {k: v * 1e6 for k, v in times.items()}})
                shown = ", ".join(f"{k} {v * 1e6:.0f}" for k, v in times.items())
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
