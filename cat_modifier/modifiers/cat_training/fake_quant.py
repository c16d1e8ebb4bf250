# SPDX-License-Identifier: Apache-2.0
"""
Quantization with a gradient.

Rounding adds noise that is proportional to the range, and does not depend on the value. So
values get the gradient of a straight-through estimator (arXiv 1308.3432). The ends of the
range get the gradient of the noise, like the step size of arXiv 1902.08153: training learns
to make ranges small. The same holds for floats near zero. The noise of larger floats is
proportional to the value.
"""

from typing import Any

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
    return _Quantize.apply(x.flatten(0, -2), args, clip_ratio).view_as(x)


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
    return _Quantize.apply(weight, args, ratio)


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


class _Quantize(torch.autograd.Function):
    """
    Quantization of rows by their ranges.

    The gradient is written out. Autograd would keep, and compute, several times as much.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, args: QuantizationArgs, ratio: float | Tensor
    ) -> Tensor:
        """See :func:`quantize_by_range`"""
        result = quantize_by_range(rows, args, ratio)
        ctx.save_for_backward(rows, result)
        ctx.args, ctx.ratio = args, ratio
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """
        Compute the gradient of ``inside + noise * size / size0``.

        `inside` is a value, or the end of the range beyond which it is. `noise` and `size0` are
        constants. `size` is the width of the range, or ``|inside|`` where the noise of a float
        is proportional to it. The ends of a range belong to its least and greatest value.
        """
        rows, result = ctx.saved_tensors
        args, ratio = ctx.args, ctx.ratio
        ratio = ratio.unsqueeze(-1) if isinstance(ratio, Tensor) else ratio
        low, high = (end.unsqueeze(-1) * ratio for end in range_ends(rows, args))
        groups = (low.shape[-2], -1)
        values, gradient = rows.unflatten(-1, groups), gradient.unflatten(-1, groups)
        inside = torch.clamp(values, low, high)
        noise = (result.view_as(values) - inside).mul_(gradient)
        if args.type == QuantizationType.FLOAT:
            is_large = inside.abs() > _uniform_part(args) * high
            gradient = gradient + torch.where(is_large, noise / inside, 0)
            noise.masked_fill_(is_large, 0)
        width = (high - low).clamp_min(torch.finfo(rows.dtype).tiny)
        to_width = noise.sum(-1, keepdim=True) / width
        # products with -1, 0 and 1: on a CPU, masks take several times as long
        side = (values - inside).sign_()
        beyond = gradient * side
        above, below = beyond * side.clamp(0, 1), beyond * side.clamp(-1, 0)
        gradient = gradient - above - below
        to_high = (above.sum(-1, keepdim=True) + to_width) * ratio
        to_low = (below.sum(-1, keepdim=True) - to_width) * ratio
        if args.symmetric:
            largest = values.abs().argmax(-1, keepdim=True)
            sign = values.gather(-1, largest).sign()
            gradient.scatter_add_(-1, largest, (to_high - to_low) * sign)
        else:
            # an end at zero is not one of the values
            gradient.scatter_add_(-1, values.argmin(-1, keepdim=True), to_low * (low < 0))
            gradient.scatter_add_(-1, values.argmax(-1, keepdim=True), to_high * (high > 0))
        return gradient.flatten(-2), None, None


def _uniform_part(args: QuantizationArgs) -> float:
    """
    Compute the bound up to which floats have intervals of equal size: twice the least normal
    number. Relative to the largest value; an average where scales are powers of two.
    """
    data = {4: FP4_E2M1_DATA, 8: FP8_E4M3_DATA}[args.num_bits]
    least_normal = 2.0 ** (2 - 2 ** (data.exponent - 1))
    return 2 * least_normal / data.max
