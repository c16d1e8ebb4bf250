# SPDX-License-Identifier: Apache-2.0
"""
This package's C++ kernels for CPUs: ``torch.ops.cat_modifier.packed_product`` and
``.transform_quantize_cpu``, of the sources beside this file.

They are compiled for the CPU when they are first needed, by the compiler and into the folder
of the other kernels, those of PyTorch's compiler.
"""

import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch._inductor.runtime.cache_dir_utils import cache_dir

__all__ = ["REMEDY", "load", "why_unavailable"]

REMEDY = (
    "install g++ 11 or newer; the folder of TORCHINDUCTOR_CACHE_DIR must be one that can be "
    "written to"
)
"""What helps where the kernels cannot be compiled"""

_SOURCES = [
    Path(__file__).with_name(name) for name in ("packed_product.cpp", "transform_quantize.cpp")
]

_LIBRARY = "cat_modifier"

# The stable interface of torch 2.10, the oldest that this package takes. Sums of integers are
# exact; floating-point operations must not be fused but where the sources say so
_FLAGS = (
    "-std=c++20 -O3 -march=native -ffp-contract=off -fPIC -shared "
    "-DTORCH_TARGET_VERSION=0x020a000000000000"
)


@cache
def why_unavailable() -> str | None:
    """
    Load the kernels, once for all layers.

    :return: why this machine cannot compile them; None if they are loaded
    """
    try:
        load()
    # of the last: a file system without locks
    except (OSError, subprocess.CalledProcessError, NotImplementedError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return next((line for line in lines if "error" in line), lines[-1])
    return None


def load(library: str = _LIBRARY, flags: str = ""):
    """
    Compile the kernels if they are not in the cache yet, and load them.

    :param library: library of the operators
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
    sources = (source.read_text() for source in _SOURCES)
    key = "\n".join((torch.__version__, *sources, *options, macros))
    name = f"kernels_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    file = Path(cache_dir()) / "cat_modifier" / name
    if not _is_loaded(file):  # without a lock at first: the folder may be read-only
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # each rank comes here
            if not _is_loaded(file):
                _compile(compiler, options, file)
                torch.ops.load_library(str(file))
    for name, schema, fake in _OPERATORS:
        torch.library.define(f"{library}::{name}", schema)
        torch.library.register_fake(f"{library}::{name}", fake)


def _is_loaded(file: Path) -> bool:
    """Load a library, unless it is not there or damaged"""
    try:
        torch.ops.load_library(str(file))
    except OSError:
        return False
    return True


def _compile(compiler: list[str], options: list[str], file: Path):
    root = Path(torch.__file__).parent
    partial = file.with_suffix(".partial")
    paths = [f"-I{root / 'include'}", *map(str, _SOURCES), f"-L{root / 'lib'}", "-ltorch_cpu"]
    command = [*compiler, *options, *paths, "-o", str(partial)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    partial.rename(file)


def _fake_product(x, scale, zero_point, weight, weight_scale, correction, bias, dtype):
    return x.new_empty((x.shape[0], weight_scale.numel()), dtype=dtype)


def _fake_transform_quantize(x, blocks, hadamard, interleave, num_bits, symmetric, clip_ratio):
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
        x.new_empty((0 if symmetric else x.shape[0], 1), dtype=torch.int32),
    )


_OPERATORS: list[tuple[str, str, Callable]] = [
    (
        "packed_product",
        "(Tensor x, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
        "Tensor? correction, Tensor? bias, ScalarType dtype) -> Tensor",
        _fake_product,
    ),
    (
        "transform_quantize_cpu",
        "(Tensor x, Tensor? blocks, Tensor? hadamard, int interleave, int num_bits, "
        "bool symmetric, Tensor? clip_ratio) -> (Tensor, Tensor, Tensor)",
        _fake_transform_quantize,
    ),
]
"""Name, schema and shapes of each operator"""
