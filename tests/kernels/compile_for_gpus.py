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

ITEM_SIZES = {"*bf16": 2, "*fp16": 2, "*fp32": 4}


def shared_memory(kernel, capability: int, types: dict, constants: dict) -> int:
    """
    :param constants: of the kernel, and the compiler's options, which begin with num_
    """
    options = {name: value for name, value in constants.items() if name.startswith("num_")}
    constants = {name: value for name, value in constants.items() if name not in options}
    constants |= {name: None for name, type in types.items() if type is None}
    types = {name: type for name, type in types.items() if type is not None}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    return compile(source, GPUTarget("cuda", capability, 32), options).metadata.shared


def precision(dtype: str) -> dict:
    return {"PRECISION": "ieee" if dtype == "*fp32" else "tf32"}


def blocks_case(dtype: str, stored: str, size: int, tokens: int):
    types = {"x_ptr": dtype, "blocks_ptr": stored, "z_ptr": dtype}
    types |= {"tokens": "i32", "in_features": "i32"}
    options = kernels.block_options(size, tokens, ITEM_SIZES[dtype])
    return kernels._blocks_kernel, types, {"SIZE": size} | precision(dtype) | options


def rows_case(
    dtype: str, size: int, interleave: int, spans: int, tokens: int, bits: int | None
):
    """
    :param size: order of the Hadamard matrix; 1 for none
    :param bits: None to transform only
    """
    types = {"z_ptr": dtype, "hadamard_ptr": None if size == 1 else dtype}
    types |= {"out_ptr": dtype, "scales_ptr": None, "zero_points_ptr": None, "clip_ptr": None}
    if bits is not None:
        types |= {"out_ptr": "*i8", "scales_ptr": "*fp32"}
    if bits == 4:
        types |= {"zero_points_ptr": "*i32", "clip_ptr": "*fp32"}
    constants = {"SPANS": spans, "SIZE": size, "INTERLEAVE": interleave, "BITS": bits or 8}
    constants |= {"SYMMETRIC": bits != 4, "QUANTIZE": bits is not None} | precision(dtype)
    options = kernels.row_options(size, interleave, tokens, ITEM_SIZES[dtype])
    return kernels._rows_kernel, types | {"in_features": "i32"}, constants | options


CASES = [
    blocks_case("*bf16", "*bf16", 128, 1),
    blocks_case("*bf16", "*i8", 128, 4096),
    blocks_case("*fp16", "*fp16", 224, 4096),
    blocks_case("*fp16", "*i8", 224, 4096),
    blocks_case("*fp32", "*fp32", 256, 4096),
    rows_case("*bf16", 112, 128, 1, 1, 4),
    rows_case("*bf16", 112, 128, 1, 4096, 4),
    rows_case("*fp16", 224, 128, 1, 1, 4),
    rows_case("*bf16", 1, 14336, 1, 4096, 8),
    rows_case("*bf16", 1, 2048, 1, 1, None),
    rows_case("*bf16", 2, 128, 43, 1, 4),
    rows_case("*bf16", 64, 64, 3, 1, None),
    # the matrix alone needs more than the shared memory
    rows_case("*bf16", 256, 1, 8, 1, 4),
    rows_case("*fp32", 256, 1, 8, 1, 8),
    rows_case("*fp32", 256, 128, 1, 1, 4),
]


def main():
    for capability in (80, 90, 100):
        for kernel, types, constants in CASES:
            memory = shared_memory(kernel, capability, types, constants)
            size = constants["SIZE"]
            print(json.dumps([kernel.__name__, capability, size, memory]), flush=True)


if __name__ == "__main__":
    main()
