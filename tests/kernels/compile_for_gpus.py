# SPDX-License-Identifier: Apache-2.0
"""
Compile the Triton kernels for GPUs from Ampere to Blackwell, down to machine code. Needs no
GPU. Prints name, compute capability, size and bytes of shared memory of each kernel.

    python tests/kernels/compile_for_gpus.py
"""

import json

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cat_modifier.kernels import triton as kernels


def shared_memory(kernel, capability: int, types: dict, constants: dict, warps: int) -> int:
    constants = constants | {name: None for name, type in types.items() if type is None}
    types = {name: type for name, type in types.items() if type is not None}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    options = {"num_warps": warps}
    return compile(source, GPUTarget("cuda", capability, 32), options).metadata.shared


def rows_cases(dtype: str):
    """Without a Hadamard matrix, and in several spans; quantized, and not"""
    for size, interleave, spans in ((1, 2048, 1), (2, 128, 43)):
        rows, columns, warps = kernels.row_shape(size, interleave)
        shape = {"SPANS": spans, "SIZE": size, "INTERLEAVE": interleave, "PRECISION": "tf32"}
        shape |= {"ROWS": rows, "COLUMNS": columns}
        types = {"z_ptr": dtype, "hadamard_ptr": None if size == 1 else dtype}
        types |= {"in_features": "i32", "clip_ptr": None, "zero_points_ptr": None}
        quantized = types | {"out_ptr": "*i8", "scales_ptr": "*fp32"}
        constants = {"BITS": 4, "SYMMETRIC": True, "QUANTIZE": True}
        yield kernels._rows_kernel, quantized, shape | constants, warps
        transformed = types | {"out_ptr": dtype, "scales_ptr": None}
        constants = {"BITS": 8, "SYMMETRIC": True, "QUANTIZE": False}
        yield kernels._rows_kernel, transformed, shape | constants, warps


def main():
    for capability in (80, 90, 100):
        for dtype, size, interleave in (("*bf16", 128, 128), ("*fp16", 224, 128)):
            common = {"BITS": 4, "SYMMETRIC": False, "PRECISION": "tf32"}
            rows = {
                "SPANS": 1,
                "SIZE": size,
                "INTERLEAVE": interleave,
                "ROWS": kernels._padded(size),
                "COLUMNS": kernels._padded(interleave),
                "QUANTIZE": True,
            }
            outputs = {"scales_ptr": "*fp32", "zero_points_ptr": "*i32", "clip_ptr": "*fp32"}
            blocks = {"x_ptr": dtype, "blocks_ptr": dtype}
            shape = {"tokens": "i32", "in_features": "i32"}
            tile = {"SIZE": size, "TILE": 64, "PADDED": kernels._padded(size)}
            cases = {
                kernels._rows_kernel: (
                    {"z_ptr": dtype, "hadamard_ptr": dtype, "out_ptr": "*i8"}
                    | outputs
                    | {"in_features": "i32"},
                    rows | common,
                    16,
                ),
                kernels._blocks_quantize_kernel: (
                    blocks | {"q_ptr": "*i8"} | outputs | shape,
                    tile | {"COUNT": 32, "TILE": 16} | common,
                    8,
                ),
                kernels._blocks_kernel: (
                    blocks | {"z_ptr": dtype} | shape,
                    tile | {"PRECISION": "tf32"},
                    8,
                ),
            }
            integers = [
                (kernel, types | {"blocks_ptr": "*i8"}, *rest)
                for kernel, (types, *rest) in cases.items()
                if "blocks_ptr" in types
            ]
            for kernel, *case in (
                *((kernel, *case) for kernel, case in cases.items()),
                *integers,
                *rows_cases(dtype),
            ):
                memory = shared_memory(kernel, capability, *case)
                print(json.dumps([kernel.__name__, capability, size, memory]), flush=True)


if __name__ == "__main__":
    main()
