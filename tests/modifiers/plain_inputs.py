# SPDX-License-Identifier: Apache-2.0
"""Inputs to plan transforms for, made of plain tensors"""

import torch

from cat_modifier.functional.layout import Rotation, choose_layout
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan

OPTIONS = {
    "rotation": Rotation.HADAMARD,
    "alignment_strength": 1.0,
    "dampening_frac": 0.01,
    "clip_activations": True,
    "precision": torch.float32,
    "max_overhead": None,
}


def make_input(names, in_features=64, block_size=16, tokens=200, scale=1.0, **changes):
    """Make an input whose channels differ in size"""
    generator = torch.Generator().manual_seed(len(names))
    x = torch.randn(tokens, in_features, generator=generator)
    order = torch.randperm(in_features, generator=generator)
    x *= scale * torch.logspace(-1, 1, in_features)[order]
    layout = changes.pop("layout", None)
    layout = layout or choose_layout(names[0], in_features, 1, block_size, Rotation.HADAMARD)
    k = layout.block_size
    blocks = x.unflatten(-1, (-1, k)).movedim(-2, 0)
    return InputToPlan(
        names=tuple(names),
        in_features=in_features,
        shards=1,
        layout=layout,
        second_moments=blocks.mT @ blocks / tokens,
        token_count=tokens,
        tokens_read=tokens,
        tokens=x[:32],
        token_weights=torch.ones(32, dtype=torch.float64),
        **changes,
    )


def make_weights(names, out=48, in_features=64) -> dict[str, torch.Tensor]:
    """Make weights of shape (out, in_features), float32"""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(out, in_features, generator=generator) for name in names}
