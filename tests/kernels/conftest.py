# SPDX-License-Identifier: Apache-2.0
"""
Triton's interpreter where there is no GPU, and the kernels in C++ for each of the instructions
they know
"""

import os
import platform

import pytest
import torch

# before Triton is imported
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from cat_modifier.kernels import native

GPU = "cuda" if torch.cuda.is_available() else "cpu"
"""Device of the Triton kernels: the CPU interprets them"""

# name: flags of the compiler that leave the CPU only these
INSTRUCTIONS = {
    "fastest": "",
    "loops": "-DCAT_PLAIN_LOOPS",
}
if platform.machine() == "x86_64":
    INSTRUCTIONS["avx512"] = "-mno-avx512bf16"
    INSTRUCTIONS["avx_vnni"] = "-mno-avx512f"
    INSTRUCTIONS["avx2"] = "-mno-avx512f -mno-avxvnni"


@pytest.fixture(scope="session")
def libraries() -> dict:
    """The operators, once for each kind of instructions"""
    for name, flags in INSTRUCTIONS.items():
        native.load(f"cat_test_{name}", flags)
    return {name: getattr(torch.ops, f"cat_test_{name}") for name in INSTRUCTIONS}
