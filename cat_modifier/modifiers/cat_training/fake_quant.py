# SPDX-License-Identifier: Apache-2.0
"""
Quantization with a gradient.

Rounding adds noise that is proportional to the range, and does not depend on the value. So
values get the gradient of a straight-through estimator (arXiv 1308.3432). The ends of the
range get the gradient of the noise, like the step size of arXiv 1902.08153: training learns
to make ranges small. The same holds for floats near zero. The noise of larger floats is
proportional to the value.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP8_E4M3_DATA
from llmcompressor.observers import Observer
from torch import Tensor

from cat_modifier.functional.sqnr import quantization_range, quantize_by_range, range_ends

__all__ = ["quantize_activations", "quantize_weight", "range_ratio"]


def quantize_activations(x: Tensor, args: QuantizationArgs, clip_ratio: float = 1.0) -> Tensor:
    """
    Quantize activations, with a gradient.

    :param x: shape (..., d), float32
    :param args: quantization to integers or symmetric floats with dynamic ranges. A global
        scale (NVFP4) is computed from x alone, not from all calibration data
    :param clip_ratio: clipped range of a token over the range of its values
    :return: shape of x
    """
    return _quantize(x.flatten(0, -2), args, clip_ratio).view_as(x)


def quantize_weight(weight: Tensor, args: QuantizationArgs, ratio: Tensor) -> Tensor:
    """
    Quantize a weight, with a gradient.

    :param weight: shape (out, d), float32
    :param args: quantization to integers or symmetric floats, with a scale per row or per
        group of a row. A global scale (NVFP4) is computed from this weight alone;
        llm-compressor computes one for all weights that serving engines merge
    :param ratio: see :func:`range_ratio`
    :return: shape (out, d)
    """
    return _quantize(weight, args, ratio)


def range_ratio(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """
    Compute the ranges that the recipe's observer chooses for a weight.

    :param weight: shape (out, d)
    :param args: see :func:`quantize_weight`
    :return: width of each range over the width of its values, shape (out, d/g)
    """
    name = args.observer or "memoryless_minmax"
    observer = Observer.load_from_registry(name, base_name="weight", args=args.model_copy())
    observer(weight)
    low, high = observer.min_vals, observer.max_vals
    width = 2 * torch.maximum(high, -low) if args.symmetric else high - low
    values = quantization_range(weight, args)
    # a range of zeros gives 0 / 0: there is nothing to clip
    return (width.reshape(values.shape) / values).nan_to_num(1.0)


def _quantize(rows: Tensor, args: QuantizationArgs, ratio: float | Tensor) -> Tensor:
    low, high = (end.unsqueeze(-1) * _last(ratio) for end in range_ends(rows, args))
    values = rows.unflatten(-1, (low.shape[-2], -1))
    inside = torch.clamp(values, low, high)
    with torch.no_grad():
        noise = quantize_by_range(rows, args, ratio).view_as(values) - inside
    size = high - low
    if args.type == QuantizationType.FLOAT:
        size = torch.where(inside.abs() > _uniform_part(args) * high, inside.abs(), size)
    growth = size / size.detach().clamp_min(torch.finfo(size.dtype).tiny)
    return (inside + noise * growth).flatten(-2)


def _last(ratio: float | Tensor) -> float | Tensor:
    return ratio.unsqueeze(-1) if isinstance(ratio, Tensor) else ratio


def _uniform_part(args: QuantizationArgs) -> float:
    """
    Compute the bound up to which floats have intervals of equal size: twice the least normal
    number. Relative to the largest value; an average where scales are powers of two.
    """
    data = {4: FP4_E2M1_DATA, 8: FP8_E4M3_DATA}[args.num_bits]
    least_normal = 2.0 ** (2 - 2 ** (data.exponent - 1))
    return 2 * least_normal / data.max
