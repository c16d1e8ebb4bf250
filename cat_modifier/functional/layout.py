# SPDX-License-Identifier: Apache-2.0
"""Sizes of the blocks and of the Hadamard product that fit an input."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from cat_modifier.functional.hadamard import (
    is_hadamard_order,
    largest_hadamard_order,
    split_hadamard,
)

__all__ = [
    "Rotation",
    "TransformLayout",
    "cheaper_layouts",
    "choose_attention_layout",
    "choose_layout",
]

_SMALLEST = 16
"""Smallest block, in channels. GPUs compute smaller blocks no faster"""


class Rotation(StrEnum):
    """
    Rotation after the alignment transform ``M`` of a block of size k.

    | Name             | Stored block | Online, after the blocks                  |
    | ---------------- | ------------ | ----------------------------------------- |
    | `hadamard`       | H_q M        | H_p over channels that are q apart: both  |
    |                  |              | together are one Hadamard over p * q      |
    | `block-hadamard` | H M          | nothing                                   |
    | `eigen-hadamard` | H V^T M      | nothing                                   |
    | `none`           | M            | nothing                                   |

    ``V`` are the eigenvectors of ``M Sx M^T``. All channels of a block then have the same
    second moment, in activations and in weights (arXiv 2512.00956).
    """

    HADAMARD = "hadamard"
    BLOCK_HADAMARD = "block-hadamard"
    EIGEN_HADAMARD = "eigen-hadamard"
    NONE = "none"

    @property
    def is_fused(self) -> bool:
        """Whether the whole rotation is part of the stored block"""
        return self in (Rotation.BLOCK_HADAMARD, Rotation.EIGEN_HADAMARD)


@dataclass(frozen=True)
class TransformLayout:
    """
    Sizes of a transform.

    A Hadamard matrix over p * q channels is the Kronecker product of two: the fused one, of
    order q, is part of the stored blocks and costs nothing if q divides k. The online one,
    of order p, runs after the blocks.

    :param block_size: k, channels that the alignment transform mixes
    :param fused_hadamard_size: q; 1 for none
    :param online_hadamard_size: p; 1 for none
    :param remark: reason for sizes below the requested ones, for the log
    """

    block_size: int
    fused_hadamard_size: int
    online_hadamard_size: int
    remark: str

    @property
    def stored_size(self) -> int:
        """Channels of a stored block"""
        return max(self.block_size, self.fused_hadamard_size)

    @property
    def hadamard_size(self) -> int:
        """p * q, channels that the whole Hadamard product mixes"""
        return self.fused_hadamard_size * self.online_hadamard_size

    @property
    def interleave(self) -> int:
        """Distance of the channels that the online Hadamard matrix multiplies"""
        return self.fused_hadamard_size if self.online_hadamard_size > 1 else 1

    def multiply_adds(self, in_features: int, are_blocks_fused: bool = False) -> int:
        """
        Count the multiply-adds at run time for one token.

        :param in_features: d, size of the input
        :param are_blocks_fused: whether the blocks are fused into the rows of another Linear
        """
        blocks = 0 if are_blocks_fused else self.stored_size
        online = self.online_hadamard_size if self.online_hadamard_size > 1 else 0
        return in_features * (blocks + online)


def choose_layout(
    name: str,
    in_features: int,
    shards: int,
    block_size: int | Literal["full"],
    rotation: Rotation,
) -> TransformLayout:
    """
    Choose the largest block and the largest Hadamard product that divide a shard.

    :param name: name of the Linear, for messages
    :param in_features: d, size of the input
    :param shards: tensor parallel shards of the input
    :param block_size: upper bound of k
    :raises ValueError: if the shards do not divide the input
    """
    if in_features % shards:
        raise ValueError(
            f"{name} has {in_features} inputs, which cannot be divided among "
            f"tensor_parallel_size={shards} shards"
        )
    shard = in_features // shards
    bound = shard if block_size == "full" else min(block_size, shard)
    size = next(
        k
        for k in range(bound, 0, -1)
        if shard % k == 0 and (not rotation.is_fused or is_hadamard_order(k))
    )
    remarks = []
    if block_size not in ("full", size):
        remarks.append(f"blocks of {block_size} do not divide {in_features} inputs")
    online, fused = 1, size if rotation.is_fused else 1
    if rotation is Rotation.HADAMARD:
        order = largest_hadamard_order(shard)
        online, fused = split_hadamard(order, size)
        if order < shard:
            remarks.append(f"no Hadamard matrix of order {shard} is known")
    if shards > 1:
        remarks.append(f"in {shards} shards")
    return TransformLayout(size, fused, online, ", ".join(remarks))


def cheaper_layouts(
    name: str,
    in_features: int,
    shards: int,
    largest: TransformLayout,
    rotation: Rotation,
    cost: Callable[[TransformLayout], float],
) -> list[TransformLayout]:
    """
    List layouts with smaller blocks. A limit of cost chooses among them.

    All have the same Hadamard size, because predicted noise does not show what Hadamard
    products gain. With smaller blocks, more of the Hadamard product runs online. Layouts
    that cost as much as a larger one are left out.

    :param name: name of the Linear, for messages
    :param in_features: d, size of the input
    :param shards: tensor parallel shards of the input
    :param largest: result of :func:`choose_layout`
    :param cost: cost of a layout at run time, in any unit
    :return: `largest` first, by falling cost
    """
    found = [largest]
    for size in range(largest.block_size - 1, _SMALLEST - 1, -1):
        if largest.block_size % size or (rotation.is_fused and not is_hadamard_order(size)):
            continue
        layout = choose_layout(name, in_features, shards, size, rotation)
        if cost(layout) < cost(found[-1]):
            found.append(layout)
    return found


def choose_attention_layout(
    name: str, in_features: int, shards: int, head_dim: int, rotation: Rotation
) -> TransformLayout:
    """
    Choose the layout of an attention output, with one block per head.

    Blocks are fused into v_proj and cost nothing. So this makes the online Hadamard matrix
    small, and nothing else.

    :param name: name of the output projection, for messages
    :param in_features: d, size of the input
    :param shards: tensor parallel shards of the input
    :param head_dim: channels of a head, the size of a block
    :raises ValueError: if the shards do not divide the heads
    """
    if in_features % (shards * head_dim):
        raise ValueError(
            f"{name} has {in_features // head_dim} heads, which cannot be divided among "
            f"tensor_parallel_size={shards} shards"
        )
    online, fused = 1, 1
    if rotation.is_fused:
        fused = largest_hadamard_order(head_dim)
    elif rotation is Rotation.HADAMARD:
        shard = in_features // shards
        online, fused = next(
            (order // q, q)
            for order in range(shard, 0, -1)
            if shard % order == 0
            for q in range(head_dim, 0, -1)
            if head_dim % q == 0 and order % q == 0
            if is_hadamard_order(q) and is_hadamard_order(order // q)
        )
    return TransformLayout(head_dim, fused, online, "attention output")
