# SPDX-License-Identifier: Apache-2.0
"""By how much the recipe's quantization lets the ranges of activations be clipped"""

from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import Tensor

from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.clipping import best_clip_ratio

__all__ = ["choose_clip_ratio"]


def choose_clip_ratio(group: SharedInput, tokens: Tensor, token_weights: Tensor) -> float:
    """
    :param tokens: sample of the transformed input, shape (tokens, d), float64
    :param token_weights: of the sample, shape (tokens,), float64
    :return: 1 unless all Linears quantize activations alike, to asymmetric integers with a
        dynamic scale for each token
    """
    schemes = [getattr(one, "quantization_scheme", None) for one in group.linears.values()]
    inputs = [scheme.input_activations if scheme else None for scheme in schemes]
    is_clipped = all(
        args is not None
        and args == inputs[0]
        and args.type == QuantizationType.INT
        and args.strategy == QuantizationStrategy.TOKEN
        and args.dynamic is True
        and not args.symmetric
        for args in inputs
    )
    return best_clip_ratio(tokens, inputs[0], token_weights) if is_clipped else 1.0
