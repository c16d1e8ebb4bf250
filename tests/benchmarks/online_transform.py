# SPDX-License-Identifier: Apache-2.0
"""
The online transform with quantization to 4 bits, alone: fused, unfused, and what stands
beside it, against the roofline: the larger of the bytes that must move over the measured
bandwidth of a copy, and the operations over the measured peak of a product of matrices.
Runs in the serve environment, on a GPU if there is one.

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
from cat_modifier.kernels import ops, plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16


def seconds(functions: dict, rounds: int) -> dict[str, float]:
    """Medians; each function in every round, as the speed of the machine drifts"""
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


def sides(tokens: int, features: int, block_size: int) -> dict:
    x = torch.randn(tokens, features, device=DEVICE, dtype=DTYPE)
    result = {"quantization alone": lambda: ops.quantize(x, 4, False)}
    for name, rotation in (
        ("blocks", Rotation.BLOCK_HADAMARD),
        ("blocks, Hadamard", Rotation.HADAMARD),
    ):
        layout = choose_layout("x", features, 1, block_size, rotation)
        count, size = features // layout.stored_size, layout.stored_size
        blocks = torch.randn(count, size, size, device=DEVICE, dtype=DTYPE) / size**0.5
        hadamard = None
        if layout.online_hadamard_size > 1:
            hadamard = hadamard_matrix(layout.online_hadamard_size).to(DEVICE, torch.float32)
        prepared = ops.PreparedTransform.of(blocks, hadamard, layout.fused_hadamard_size, DTYPE)
        unfused = None if hadamard is None else hadamard.to(DTYPE)
        result[f"fused: {name}"] = lambda p=prepared: p.quantize(x, 4, False)
        result[f"unfused: {name}"] = lambda p=prepared: ops.quantize(p(x), 4, False)
        result[f"torch.bmm, separate quantization: {name}"] = (
            lambda b=blocks, h=unfused, g=layout: plain.quantize_per_token(
                plain.transform(x, b, h, g.fused_hadamard_size), 4, False
            )
        )
    if features <= 8192:
        dense = torch.randn(features, features, device=DEVICE, dtype=DTYPE)
        result["dense d x d product"] = lambda: x @ dense
    if features & (features - 1) == 0 and DEVICE == "cuda":
        from vllm import _custom_ops

        result["hadacore"] = lambda: _custom_ops.hadacore_transform(x)
    return result


def measure_peaks() -> tuple[float, float]:
    """Bytes/s of a copy, read and written, and multiply-adds/s of a bf16 product"""
    source = torch.empty(2**28 if DEVICE == "cpu" else 2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a: Tensor = torch.randn(4096, 4096, device=DEVICE, dtype=DTYPE)
    times = seconds({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, 3)
    return 2 * source.numel() / times["copy"], 4096**3 / times["product"]


def roofline(
    tokens: int, features: int, stored: int, outer: int, bandwidth: float, peak: float
) -> float:
    moved = tokens * (features * (2 + 1) + 8) + 2 * features * stored
    operations = tokens * features * (stored + (outer if outer > 1 else 0))
    return max(moved / bandwidth, operations / peak)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 4096])
    parser.add_argument("--features", nargs="+", type=int, default=[2048, 4096, 8192, 14336])
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    bandwidth, peak = measure_peaks()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}: copy {bandwidth / 1e9:.0f} GB/s, bf16 {2 * peak / 1e12:.2f} TFLOP/s")
    rows = []
    for features in args.features:
        for block_size in args.block_sizes:
            for tokens in args.tokens:
                with torch.inference_mode():
                    times = seconds(sides(tokens, features, block_size), args.rounds)
                row = {"tokens": tokens, "d": features, "k": block_size}
                for kind, rotation in (
                    ("blocks", Rotation.BLOCK_HADAMARD),
                    ("blocks, Hadamard", Rotation.HADAMARD),
                ):
                    layout = choose_layout("x", features, 1, block_size, rotation)
                    bound = roofline(
                        tokens,
                        features,
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
                    f"d {features}, k {block_size}, {tokens} tokens, us: {shown}; "
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
