# SPDX-License-Identifier: Apache-2.0
"""How large the blocks and the Hadamard product of a transform can be for a given input"""

from dataclasses import dataclass
from typing import Literal

from cat_modifier.mathematics.hadamard import is_hadamard_order, largest_hadamard_order
from cat_modifier.mathematics.transform import Rotation

__all__ = ["Geometry", "choose_geometry"]


@dataclass(frozen=True)
class Geometry:
    """
    :param block_size: k, channels of a block
    :param hadamard_size: channels that are mixed after the blocks at run time; 1 if none
    :param remark: why they are not larger, for the log
    """

    block_size: int
    hadamard_size: int
    remark: str


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
    hadamard_size = 1
    if rotation is Rotation.HADAMARD:
        hadamard_size = largest_hadamard_order(shard)
        if hadamard_size < shard:
            remarks.append(f"no Hadamard matrix of order {shard} is known")
    if shards > 1:
        remarks.append(f"in {shards} shards")
    return Geometry(size, hadamard_size, ", ".join(remarks))
