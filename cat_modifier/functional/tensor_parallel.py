# SPDX-License-Identifier: Apache-2.0
"""The tensor parallel size that the transforms of a model should allow."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cat_modifier.functional.layout import (
    Rotation,
    TransformLayout,
    choose_attention_layout,
    choose_layout,
)

__all__ = ["InputToShard", "largest_tensor_parallel_size"]

_LARGEST = 8
"""GPUs of one machine"""


@dataclass(frozen=True)
class InputToShard:
    """
    Shape of an input that tensor parallelism may split.

    :param in_features: d, size of the input
    :param head_dim: channels of a head, where the transform is fused into v_proj; None
        elsewhere
    :param unit: channels that must stay on one rank, such as a quantization group
    """

    in_features: int
    head_dim: int | None = None
    unit: int = 1

    def layout(
        self, shards: int, block_size: int | Literal["full"], rotation: Rotation
    ) -> TransformLayout:
        """
        Choose the layout of the input.

        :raises ValueError: if the shards do not divide the input
        """
        if self.head_dim is not None:
            return choose_attention_layout(
                "", self.in_features, shards, self.head_dim, rotation
            )
        return choose_layout("", self.in_features, shards, block_size, rotation)


def largest_tensor_parallel_size(
    heads: int,
    kv_heads: int,
    inputs: Iterable[InputToShard],
    block_size: int | Literal["full"],
    rotation: Rotation,
) -> int:
    """
    Find the largest tensor parallel size, a power of two up to 8, that makes transforms
    little smaller.

    - It divides the query heads.
    - It divides the KV heads, or the KV heads divide it. In the latter case several ranks
      hold the same KV head, with its whole v_proj and the transform fused into it.
    - It divides each input into whole units.
    - It leaves at least half of each block size, and at least half of the Hadamard size
      where that is smaller than the block.

    Blocks of `full` must not become smaller at all: the result is 1.

    :param heads: number of query heads; 0 for a model without attention
    :param kv_heads: number of KV heads; 0 for a model without attention
    :param inputs: inputs that may be split
    :param block_size: upper bound of k
    """
    shapes = set(inputs)
    if block_size == "full" and shapes:
        return 1

    def fits(size: int) -> bool:
        if heads % size or (kv_heads % size and size % kv_heads):
            return False
        return all(_fits(one, size, block_size, rotation) for one in shapes)

    size = _LARGEST
    while size > 1 and not fits(size):
        size //= 2
    return size


def _fits(
    one: InputToShard, size: int, block_size: int | Literal["full"], rotation: Rotation
) -> bool:
    """Whether an input can be split, and its layout stays large"""
    if one.in_features % (size * one.unit) or one.in_features % (size * (one.head_dim or 1)):
        return False
    whole, shard = (one.layout(shards, block_size, rotation) for shards in (1, size))
    mixed = min(whole.hadamard_size, whole.block_size)
    return 2 * shard.block_size >= whole.block_size and 2 * shard.hadamard_size >= mixed
