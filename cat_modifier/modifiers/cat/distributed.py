# SPDX-License-Identifier: Apache-2.0
"""Communication between ranks during calibration."""

from typing import Any

import torch.distributed as dist
from compressed_tensors.distributed import is_distributed

__all__ = ["barrier", "gather", "rank"]


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks. A collective call"""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait for all ranks"""
    if is_distributed():
        dist.barrier()


def rank() -> int:
    """Return the index of this rank; 0 in a single process"""
    return dist.get_rank() if is_distributed() else 0
