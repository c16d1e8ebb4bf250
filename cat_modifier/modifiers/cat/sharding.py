# SPDX-License-Identifier: Apache-2.0
"""Which inputs tensor parallelism splits"""

import re
from collections.abc import Iterable

from torch.nn import Module

__all__ = ["may_be_sharded"]


def may_be_sharded(model: Module, names: Iterable[str]) -> bool:
    """
    :param names: of Linears that read the same input
    :return: whether a tensor parallel rank may get a part of the input, not all of it
    """
    plan = getattr(model, "tp_plan", None) or {}
    # the plan is Transformers', and vLLM's can differ: trust nothing but a clear yes
    column_parallel = [
        re.compile(r"(^|\.)" + re.escape(pattern).replace(r"\*", r"\d+") + "$")
        for pattern, style in plan.items()
        if style == "colwise"
    ]
    return not all(any(pattern.search(name) for pattern in column_parallel) for name in names)
