# SPDX-License-Identifier: Apache-2.0
"""
Compile the Triton kernels for GPUs from Ampere to Blackwell, down to machine code, which
needs no GPU. Prints the name of the kernel, the compute capability, the shapes, and the
bytes of shared memory of each.

    python tests/kernels/compile_for_gpus.py
"""

import json

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cat_modifier.kernels import gpu, gpu_packed


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
    """Without a Hadamard matrix, in several spans, not quantized; and packed"""
    outputs = {"out_ptr": "*i8", "scales_ptr": "*fp32", "features": "i32", "clip_ptr": None}
    for size, stride, spans in ((1, 2048, 1), (2, 128, 43)):
        rows, columns, warps = gpu.row_shape(size, stride)
        shape = {"SPANS": spans, "SIZE": size, "STRIDE": stride, "PRECISION": "tf32"}
        shape |= {"ROWS": rows, "COLUMNS": columns}
        hadamard = {"hadamard_ptr": None if size == 1 else dtype}
        quantized = {"BITS": 4, "SYMMETRIC": True, "QUANTIZE": True, "zero_points_ptr": None}
        plain = {"QUANTIZE": False, "zero_points_ptr": None, "scales_ptr": None}
        yield gpu._rows_kernel, {"z_ptr": dtype} | hadamard | outputs, shape | quantized, warps
        out = {"out_ptr": dtype, "features": "i32", "clip_ptr": None}
        plain |= {"BITS": 8, "SYMMETRIC": True}
        yield gpu._rows_kernel, {"z_ptr": dtype} | hadamard | out, shape | plain, warps
        for format, group in gpu_packed.GROUP_SIZES.items():
            is_grouped = group is not None
            types = {"z_ptr": dtype, "codes_ptr": "*u8", "gain": "fp32", "features": "i32"}
            types |= {"scales_ptr": "*u8" if is_grouped else "*fp32", "scale_columns": "i32"}
            types |= {"global_scale_ptr": "*fp32" if format == "nvfp4" else None}
            constants = shape | {"FORMAT": format, "GROUP": group or 2}
            yield gpu_packed._pack_kernel, types | hadamard, constants, warps


def main():
    for capability in (80, 90, 100):
        for dtype, size, stride in (("*bf16", 128, 128), ("*fp16", 224, 128)):
            common = {"BITS": 4, "SYMMETRIC": False, "PRECISION": "tf32"}
            rows = {
                "SPANS": 1,
                "SIZE": size,
                "STRIDE": stride,
                "ROWS": gpu._padded(size),
                "COLUMNS": gpu._padded(stride),
                "QUANTIZE": True,
            }
            outputs = {"scales_ptr": "*fp32", "zero_points_ptr": "*i32", "clip_ptr": "*fp32"}
            blocks = {"x_ptr": dtype, "blocks_ptr": dtype}
            shape = {"tokens": "i32", "features": "i32"}
            tile = {"SIZE": size, "TILE": 64, "PADDED": gpu._padded(size)}
            cases = {
                gpu._rows_kernel: (
                    {"z_ptr": dtype, "hadamard_ptr": dtype, "out_ptr": "*i8"}
                    | outputs
                    | {"features": "i32"},
                    rows | common,
                    16,
                ),
                gpu._blocks_quantize_kernel: (
                    blocks | {"codes_ptr": "*i8"} | outputs | shape,
                    tile | {"COUNT": 32, "TILE": 16} | common,
                    8,
                ),
                gpu._blocks_kernel: (
                    blocks | {"z_ptr": dtype} | shape,
                    tile | {"PRECISION": "tf32"},
                    8,
                ),
            }
            for kernel, *case in (
                *((kernel, *case) for kernel, case in cases.items()),
                *rows_cases(dtype),
            ):
                memory = shared_memory(kernel, capability, *case)
                print(json.dumps([kernel.__name__, capability, size, memory]), flush=True)


if __name__ == "__main__":
    main()
