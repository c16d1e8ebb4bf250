# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that tensor parallelism splits."""

import math
import re
from collections.abc import Iterable, Mapping

from torch.nn import Linear, Module
from transformers import PretrainedConfig

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.functional.tensor_parallel import InputToShard

__all__ = ["count_heads", "inputs_to_shard", "may_be_sharded"]

_PACKED = 8
"""Number of 4-bit weights that a checkpoint packs into one integer"""


def count_heads(config: PretrainedConfig) -> tuple[int, int]:
    """
    Count query heads and KV heads of the text model; 0 where its config has no count.

    Layers may differ: then this is the greatest common divisor of their counts.
    """
    config = config.get_text_config()
    heads, kv_heads = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    return _common(heads), _common(heads if kv_heads is None else kv_heads)


def _common(count: int | Iterable[int] | None) -> int:
    """Compute the greatest common divisor of one count, or of one count per layer"""
    return math.gcd(*([count] if isinstance(count, int) else count or []))


def inputs_to_shard(
    model: Module,
    linears: Mapping[str, Linear],
    value_projections: Mapping[str, ValueProjection],
) -> list[InputToShard]:
    """
    List the inputs that tensor parallelism may split.

    :param linears: Linears that are transformed, by full name
    :param value_projections: value projections to fuse blocks into, by the name of the
        output projection
    """
    found = []
    for name, linear in linears.items():
        if not may_be_sharded(model, [name]):
            continue
        scheme = getattr(linear, "quantization_scheme", None)
        args = (scheme.weights, scheme.input_activations) if scheme is not None else ()
        groups = [one.group_size for one in args if one is not None and one.group_size]
        projection = value_projections.get(name)
        found.append(
            InputToShard(
                linear.in_features,
                None if projection is None else projection.head_dim,
                math.lcm(_PACKED, *(size for size in groups if size > 0)),
            )
        )
    return found


def may_be_sharded(model: Module, names: Iterable[str]) -> bool:
    """
    Whether a tensor parallel rank may get a part of an input instead of all of it.

    :param names: Linears that read the input
    """
    plan = getattr(model, "tp_plan", None) or {}
    # vLLM may split other Linears than this plan of Transformers: only columns are certain
    column_parallel = [
        _compile(pattern)
        for pattern, style in plan.items()
        if style in ("colwise", "packed_colwise", "colwise_gather_output")
    ]
    return not all(any(pattern.search(name) for pattern in column_parallel) for name in names)


def _compile(pattern: str) -> re.Pattern:
    """Make a pattern of Linears from one of a plan, where experts of a layer are fused"""
    expression = re.escape(pattern).replace(r"\*", r"\d+")
    expression = expression.replace(r"experts\.gate_up_proj", r"experts\.\d+\.(gate|up)_proj")
    return re.compile(rf"(^|\.){expression}$")
