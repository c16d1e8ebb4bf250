# SPDX-License-Identifier: Apache-2.0
"""Linear method that transforms the input, then lets vLLM's own method compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from cat_modifier.integrations.vllm.compat import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from cat_modifier.integrations.vllm.registry import TransformedInput, TransformRegistry
from cat_modifier.integrations.vllm.unloaded import check_scales
from cat_modifier.integrations.vllm.whole import whole_weights

__all__ = ["TransformLinearMethod"]


@register_weight_loader_v2_supported_method
class TransformLinearMethod(LinearMethodBase):
    """
    Applies an input transform, then another linear method.

    :param method: method that vLLM uses without the transform
    :param source: the transformed input
    :param is_first: whether this layer holds the transform; others use it from there
    :param registry: all transforms of the model
    """

    def __init__(
        self,
        method: LinearMethodBase,
        source: TransformedInput,
        is_first: bool,
        registry: TransformRegistry,
    ):
        self.method = method
        self.source = source
        self.is_first = is_first
        self.registry = registry

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **extra_weight_attrs,
    ):
        self.method.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=whole_weights(layer, weight_loader),
            **extra_weight_attrs,
        )
        # vLLM may quantize an input before the layer sees it, which would be too early
        layer.requires_unquantized_input = True
        if self.is_first:
            sizes = (input_size, input_size_per_partition)
            self.source.add_to(layer, *sizes, params_dtype, keeps_int8=False)

    def process_weights_after_loading(self, layer: Any):
        """
        :raises ValueError: if the transform was not loaded, or a scale is not positive and
            finite
        """
        self.registry.check_claimed()
        if self.is_first:
            self.source.module.check_loaded()
        scale = getattr(layer, "weight_scale", None)
        # of scales of whole tensors, some belong to no part of a merged layer; those of 4-bit
        # floats have 8 bits, and may be 0
        if scale is not None and scale.ndim == 2 and scale.element_size() > 1:
            # rows of padding of an lm_head are not loaded
            rows = getattr(layer, "num_org_embeddings_per_partition", len(scale))
            check_scales(layer.prefix, scale.data[:rows])
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(layer, self.source.module(x), bias)
