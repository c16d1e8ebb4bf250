# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a distributed calibration tell each other"""

from typing import Any

import torch.distributed as dist
from compressed_tensors.distributed import is_distributed

__all__ = ["barrier", "of_all_ranks"]


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank. A collective call"""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    if is_distributed():
        dist.barrier()
