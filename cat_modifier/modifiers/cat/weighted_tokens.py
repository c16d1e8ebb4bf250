# SPDX-License-Identifier: Apache-2.0
"""Weights of the tokens that attention reads, from a second run of each attention module."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from torch import Tensor
from torch.nn import Linear, Module
from torch.utils._pytree import tree_leaves

from cat_modifier.calibration.sensitivity import WeightedInput, weighted_inputs

__all__ = ["WeightedTokens"]

_ENOUGH_TOKENS = 8192
"""Tokens that each attention module is run again for: time, for little in accuracy"""


class WeightedTokens:
    """
    Runs attention modules a second time when they are called, to weight their tokens.

    It does so for some of the batches, evenly spread. Attention is what a decoding layer calls
    with an `attention_mask`, also if that is None: the outermost such module. Linears outside
    of it that read the same input, as the MLP of parallel decoding layers, share its weights.

    :param linears: targeted Linears by full name
    :param layers: decoding layers by full name; without them all tokens count alike
    :param batches: number of batches; None if it is not known, to take all
    :param seed: seed of the random directions
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        layers: Mapping[str, Module],
        batches: int | None,
        seed: int,
    ):
        self._linears, self._layers = linears, set(layers.values())
        self._layer_names = tuple(f"{name}." for name in layers)
        self._batches, self._seed = batches, seed
        self._stride: int | None = None
        self._covered: set[Module] = set()
        self._failed: set[str] = set()
        self._scales: Tensor | None = None

    def covers(self, linear: Linear) -> bool:
        """Whether the calls of a Linear come from :meth:`enter` of a module around it"""
        return linear in self._covered

    def enter(
        self,
        name: str,
        module: Module,
        args: tuple,
        kwargs: Mapping[str, Any],
        batch: int,
        mask: Tensor | None,
    ) -> list[WeightedInput]:
        """
        Note that a module is called.

        :param name: full name of the module
        :param batch: index of the batch
        :param mask: real tokens of the batch, shape (batch, tokens), bool; None for all
        :return: calls of the Linears in it with weights, if it is attention; nothing if it is
            not, or for other batches
        """
        if module in self._layers:
            self._scales = _token_scales(args, kwargs, mask)
            if self._stride is None and self._scales is not None:
                tokens = self._scales.numel() * (self._batches or 0)
                self._stride = max(1, tokens // _ENOUGH_TOKENS)
        is_attention = "attention_mask" in kwargs and name.startswith(self._layer_names)
        if not is_attention or module in self._covered or name in self._failed:
            return []
        if self._stride is not None and batch % self._stride:
            return []
        inside = {x: one for x, one in self._linears.items() if x.startswith(f"{name}.")}
        try:
            with HooksMixin.disable_hooks():
                # the same direction in any order of layers and batches
                seed = zlib.crc32(f"{name} {batch} {self._seed}".encode())
                generator = torch.Generator().manual_seed(seed)
                found = weighted_inputs(module, args, kwargs, inside, self._scales, generator)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            logger.warning(
                f"All tokens of {name} count alike, because it cannot run a second time with "
                f"gradients: {error}"
            )
            self._failed.add(name)
            return []
        self._covered.update(child for child in module.modules() if child is not module)
        # the output does not depend on some Linears, or the gradient is not finite: alike
        return [
            one if one.weights.sum() > 0 else one._replace(weights=torch.ones_like(one.weights))
            for one in found
        ]


def _token_scales(args: tuple, kwargs: Mapping[str, Any], mask: Tensor | None) -> Tensor | None:
    """
    Compute the inverse norms of the tokens that a decoding layer adds to. An error counts in
    proportion to the norm, and at padding not at all.

    :param args: arguments of the layer, the tokens first
    :return: shape (..., 1), float32; None without tokens
    """
    floats = (
        one
        for one in tree_leaves((args, dict(kwargs)))
        if isinstance(one, Tensor) and one.is_floating_point()
    )
    hidden = next(floats, None)
    if hidden is None:
        return None
    norms = hidden.float().norm(dim=-1, keepdim=True)
    scales = torch.where(norms > 0, 1 / norms, 0)
    if mask is not None and mask.shape == scales.shape[:-1]:
        scales = scales * mask.to(scales.device).unsqueeze(-1)
    return scales
