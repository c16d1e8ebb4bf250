# SPDX-License-Identifier: Apache-2.0
"""
Quantization with a gradient.

What rounding adds to values is noise which does not depend on them, but for its size: the
intervals grow with the range. So values have the gradient of a straight-through estimator
(arXiv 1308.3432), and the ends of the range that of noise in proportion to it (as the step
size of arXiv 1902.08153), by which training learns to make ranges small. Floats near zero are
rounded so, too; the intervals of others grow with the value itself, and with it their noise.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP8_E4M3_DATA
from llmcompressor.observers import Observer
from torch import Tensor

from cat_modifier.mathematics.clipping import clip_tokens
from cat_modifier.mathematics.sqnr import quantization_range, quantize_by_range

__all__ = ["quantize_activations", "quantize_weight", "range_ratio"]


def quantize_activations(x: Tensor, args: QuantizationArgs, clip_ratio: float = 1.0) -> Tensor:
    """
    :param x: shape (..., d), float32
    :param args: of integers or floats whose ranges are found at run time. A global scale, as
        NVFP4 has one, is that of these values, not of all that were calibrated on
    :param clip_ratio: of the range of each token to that of its values
    :return: shape of x
    """
    rows = x.flatten(0, -2)
    if clip_ratio < 1:
        rows = clip_tokens(rows, clip_ratio)
    return _round(rows, args).view_as(x)


def quantize_weight(weight: Tensor, args: QuantizationArgs, ratio: Tensor) -> Tensor:
    """
    :param weight: shape (out, d), float32
    :param args: of integers or floats, with a scale for each row or for each group of a row
    :param ratio: see :func:`range_ratio`
    :return: shape (out, d)
    """
    ranges = weight.unflatten(-1, (ratio.shape[-1], -1))
    return _round(clip_tokens(ranges, ratio.unsqueeze(-1)).flatten(-2), args)


def range_ratio(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """
    What the observer of a recipe makes of the ranges of a weight.

    :param weight: shape (out, d)
    :param args: see :func:`quantize_weight`
    :return: of the width of each range to that of its values, at most 1, shape (out, d/g)
    """
    name = args.observer or "memoryless_minmax"
    observer = Observer.load_from_registry(name, base_name="weight", args=args.model_copy())
    observer(weight)
    low, high = observer.min_vals, observer.max_vals
    width = 2 * torch.maximum(high, -low) if args.symmetric else high - low
    values = quantization_range(weight, args)
    ratio = width.reshape(values.shape) / values
    # 0 of 0 is nan: nothing is there to be clipped
    return ratio.clamp_max(1).nan_to_num(1.0)


def _round(rows: Tensor, args: QuantizationArgs) -> Tensor:
    with torch.no_grad():
        noise = quantize_by_range(rows, args) - rows
    ranges = quantization_range(rows, args)
    size = ranges.unsqueeze(-1)
    values = rows.unflatten(-1, (ranges.shape[-1], -1))
    if args.type == QuantizationType.FLOAT:
        size = torch.where(values.abs() > _uniform_part(args) * size, values.abs(), size)
    growth = size / size.detach().clamp_min(torch.finfo(size.dtype).tiny)
    return (values + noise.view_as(values) * growth).flatten(-2)


def _uniform_part(args: QuantizationArgs) -> float:
    """Share of a range: so far from zero, intervals of floats are of one size"""
    data = {4: FP4_E2M1_DATA, 8: FP8_E4M3_DATA}[args.num_bits]
    least_normal = 2.0 ** (2 - 2 ** (data.exponent - 1))
    return least_normal / data.max
