# SPDX-License-Identifier: Apache-2.0
"""
The product of int8 activations and packed 4-bit weights on CPUs:
``torch.ops.cat_modifier.packed_product``, of ``packed_product.cpp``.

The source is compiled for the CPU when it is first needed, by the compiler and into the folder
of the other kernels, those of PyTorch's compiler.
"""

import hashlib
import os
import shlex
import subprocess
from contextlib import suppress
from functools import cache
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.nn.functional import pad

__all__ = ["load", "pack", "why_unavailable"]

_SOURCE = Path(__file__).with_name("packed_product.cpp")

_LIBRARY = "cat_modifier"

_SCHEMA = (
    "(Tensor x, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? correction, Tensor? bias, ScalarType dtype) -> Tensor"
)

# The stable interface of torch 2.10, the oldest that this package takes. Sums of products are
# exact; the other operations must not be fused but where the source says so
_FLAGS = (
    "-std=c++20 -O3 -march=native -ffp-contract=off -fPIC -shared "
    "-DTORCH_TARGET_VERSION=0x020a000000000000"
)

_ROWS, _INPUTS = 32, 8
"""Channels of a panel, input channels of a line: see the source"""

_LARGE_PAGE = 2**21
"""Bytes"""


def pack(weight: Tensor) -> Tensor:
    """
    Pack weights in the order in which the product reads them.

    :param weight: shape (out, in), int8, values of 4 bits
    :return: shape (ceil(out / 32), ceil(in / 8), 128), uint8
    """
    rows, inputs = weight.shape
    codes = pad(weight + 8, (0, -inputs % _INPUTS, 0, -rows % _ROWS), value=8)
    panels = codes.view(torch.uint8).unflatten(0, (-1, _ROWS)).unflatten(2, (-1, 2, 4))
    low, high = panels.permute(3, 0, 2, 1, 4).flatten(3)
    return _in_large_pages(low | (high << 4))


def _in_large_pages(tensor: Tensor) -> Tensor:
    """Copy a tensor to large pages, if the system has them: they are read a fifth faster"""
    if tensor.numel() < _LARGE_PAGE:
        return tensor
    memory = mmap(-1, tensor.numel(), MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


@cache
def why_unavailable() -> str | None:
    """
    Load the product, once for all layers.

    :return: why this machine cannot compile it; None if it is loaded
    """
    try:
        load()
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return next((line for line in lines if "error" in line), lines[-1])
    return None


def load(library: str = _LIBRARY, flags: str = ""):
    """
    Compile the product if it is not in the cache yet, and load it.

    :param library: library of the operator
    :param flags: more flags of the compiler
    :raises FileNotFoundError: if there is no compiler
    :raises subprocess.CalledProcessError: if the compiler fails
    """
    # as PyTorch's compiler finds it
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    options = [*shlex.split(f"{_FLAGS} {flags}"), f"-DCAT_LIBRARY={library}"]
    # all that the compiler knows of the CPU and of itself
    asked = [*compiler, *options, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    key = "\n".join((torch.__version__, _SOURCE.read_text(), *options, macros))
    name = f"packed_product_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    file = Path(cache_dir()) / "cat_modifier" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # each rank comes here
        if not file.exists():
            _compile(compiler, options, file)
    torch.ops.load_library(str(file))
    torch.library.define(f"{library}::packed_product", _SCHEMA)
    torch.library.register_fake(f"{library}::packed_product", _fake)


def _compile(compiler: list[str], options: list[str], file: Path):
    root = Path(torch.__file__).parent
    partial = file.with_suffix(".partial")
    paths = [f"-I{root / 'include'}", str(_SOURCE), f"-L{root / 'lib'}", "-ltorch_cpu"]
    command = [*compiler, *options, *paths, "-o", str(partial)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    partial.rename(file)


def _fake(x, scale, zero_point, weight, weight_scale, correction, bias, dtype):
    return x.new_empty((x.shape[0], weight_scale.numel()), dtype=dtype)
