# SPDX-License-Identifier: Apache-2.0
"""The size of a checkpoint."""

from pathlib import Path

__all__ = ["weight_bytes"]


def weight_bytes(folder: Path) -> int:
    """Count the bytes of a checkpoint's weights"""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
