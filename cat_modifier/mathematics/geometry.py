# SPDX-License-Identifier: Apache-2.0
"""How large the blocks and the Hadamard product of a transform can be for a given input"""

from dataclasses import dataclass
from typing import Literal

from cat_modifier.mathematics.hadamard import (
    is_hadamard_order,
    largest_hadamard_order,
    split_hadamard,
)
from cat_modifier.mathematics.transform import Rotation

__all__ = ["Geometry", "cheaper_geometries", "choose_geometry", "choose_head_geometry"]

_SMALLEST = 16
"""Channels of a block, below which GPUs gain nothing"""


@dataclass(frozen=True)
class Geometry:
    """
    A Hadamard product over ``p * q`` channels is the Kronecker product of two: the inner
    one, of order q, is part of the stored blocks, and costs nothing if q divides k.

    :param block_size: k, channels that the alignment mixes
    :param inner: q; 1 if there is none
    :param outer: p, order of the Hadamard matrix which is applied at run time to channels
        that are q apart; 1 if there is none
    :param remark: why they are not larger, for the log
    """

    block_size: int
    inner: int
    outer: int
    remark: str

    @property
    def stored_size(self) -> int:
        """Channels of a stored block"""
        return max(self.block_size, self.inner)

    @property
    def hadamard_size(self) -> int:
        """Channels that the Hadamard product mixes"""
        return self.inner * self.outer

    def multiply_adds(self, features: int, are_blocks_folded: bool = False) -> int:
        """
        At run time, for a token. GPUs fill what they multiply up to powers of two.

        :param features: d, size of the input
        :param are_blocks_folded: whether the blocks are in the rows of another Linear
        """
        blocks = 0 if are_blocks_folded else self.stored_size
        return features * (blocks + (self.outer if self.outer > 1 else 0))


def choose_geometry(
    name: str,
    features: int,
    shards: int,
    block_size: int | Literal["full"],
    rotation: Rotation,
) -> Geometry:
    """
    :param name: of the Linear, for messages
    :param features: d, size of the input
    :param shards: into which the input may be divided when it is served
    :param block_size: upper bound of k
    :return: the largest block which divides a shard and which the rotation allows, and the
        largest Hadamard product which divides a shard
    :raises ValueError: if the input cannot be divided into so many shards
    """
    if features % shards:
        raise ValueError(
            f"{name} has {features} inputs, which cannot be divided among "
            f"tensor_parallel_size={shards} shards"
        )
    shard = features // shards
    bound = shard if block_size == "full" else min(block_size, shard)
    size = next(
        k
        for k in range(bound, 0, -1)
        if shard % k == 0 and (not rotation.is_folded or is_hadamard_order(k))
    )
    remarks = []
    if block_size not in ("full", size):
        remarks.append(f"blocks of {block_size} do not suit {features} inputs")
    outer, inner = 1, size if rotation.is_folded else 1
    if rotation is Rotation.HADAMARD:
        span = largest_hadamard_order(shard)
        outer, inner = split_hadamard(span, size)
        if span < shard:
            remarks.append(f"no Hadamard matrix of order {shard} is known")
    if shards > 1:
        remarks.append(f"in {shards} shards")
    return Geometry(size, inner, outer, ", ".join(remarks))


def cheaper_geometries(
    name: str, features: int, shards: int, largest: Geometry, rotation: Rotation
) -> list[Geometry]:
    """
    What a transform can be which is to cost less: with smaller blocks, that divide the
    largest. Hadamard products stay as they are, as what they are worth is not in the noise
    that theory predicts. A smaller block leaves more of them to be done after it: if it costs
    as much as a larger one, it is left out.

    :param largest: of :func:`choose_geometry`
    :return: by falling cost, from `largest` on
    """
    found = [largest]
    for size in range(largest.block_size - 1, _SMALLEST - 1, -1):
        if largest.block_size % size or (rotation.is_folded and not is_hadamard_order(size)):
            continue
        geometry = choose_geometry(name, features, shards, size, rotation)
        if geometry.multiply_adds(features) < found[-1].multiply_adds(features):
            found.append(geometry)
    return found


def choose_head_geometry(
    name: str, features: int, shards: int, head_dim: int, rotation: Rotation
) -> Geometry:
    """
    Of a transform whose blocks are heads and cost nothing, so that only the outer Hadamard
    matrix is left to be made small.

    :param name: of the Linear, for messages
    :param features: d, size of the input
    :param shards: into which the input may be divided when it is served
    :param head_dim: channels of a head, which become a block
    :raises ValueError: if heads cannot be divided into so many shards
    """
    if features % (shards * head_dim):
        raise ValueError(
            f"{name} has {features // head_dim} heads, which cannot be divided among "
            f"tensor_parallel_size={shards} shards"
        )
    outer, inner = 1, 1
    if rotation.is_folded:
        inner = largest_hadamard_order(head_dim)
    elif rotation is Rotation.HADAMARD:
        outer, inner = next(
            (span // q, q)
            for span in range(features // shards, 0, -1)
            if (features // shards) % span == 0
            for q in range(head_dim, 0, -1)
            if head_dim % q == 0 and span % q == 0
            if is_hadamard_order(q) and is_hadamard_order(span // q)
        )
    return Geometry(head_dim, inner, outer, "in heads")
