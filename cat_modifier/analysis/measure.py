# SPDX-License-Identifier: Apache-2.0
"""From the statistics of an input to the SQNR of the Linears that read it"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.utils import align_module_device, get_execution_device
from torch import Tensor

from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.statistics import AnalysisStatistics
from cat_modifier.analysis.transforms import TRANSFORMS, GroupData
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.sqnr import (
    achievable_alignment,
    alignment,
    concentration,
    energy,
    measured_sqnr,
    predicted_sqnr,
    to_db,
)
from cat_modifier.functional.alignment import matrix_power, transformed_energy

__all__ = ["LayerResult", "measure_group"]


@dataclass(frozen=True)
class LayerResult:
    """
    One Linear under one transform and one scheme. Ratios of energies are in dB, as
    ``10 log10``: all names that end in `_db`. They are defined in
    :mod:`cat_modifier.functional.sqnr`.

    :param layer: full name of the Linear
    :param input: name of the first Linear which reads the same input
    :param in_features: d
    :param out_features: rows of the weight
    :param transform: name in ``TRANSFORMS``
    :param scheme: as `W4A4`
    :param block_size: k of the transform's blocks
    :param weight_concentration_db: C(W), of the transformed weight
    :param activation_concentration_db: C(x), of the transformed input
    :param alignment_db: A(x, W)
    :param achievable_block_db: best alignment of this Linear over transforms with blocks of
        the analysis' size, if the Linear had its input for itself
    :param achievable_full_db: the same over all transforms; nan unless the analysis has a
        transform of whole inputs
    :param predicted_weights_db: SQNR by lemma 2.3, only weights being quantized
    :param predicted_activations_db: SQNR by lemma 2.2, only activations
    :param predicted_db: SQNR by theorem 2.4, both
    :param measured_weights_db: SQNR with weights quantized to the nearest integers in
        the range of each channel
    :param measured_activations_db: the same with activations, in the range of each token
    :param measured_db: both
    :param tokens: which were seen
    :param largest_token: energy of the largest token over that of the mean one, a ratio.
        If it is large, the prediction speaks of a few tokens, whose noise is not uniform
    """

    layer: str
    input: str
    in_features: int
    out_features: int
    transform: str
    scheme: str
    block_size: int
    weight_concentration_db: float
    activation_concentration_db: float
    alignment_db: float
    achievable_block_db: float
    achievable_full_db: float
    predicted_weights_db: float
    predicted_activations_db: float
    predicted_db: float
    measured_weights_db: float
    measured_activations_db: float
    measured_db: float
    tokens: int
    largest_token: float


@torch.no_grad()
def measure_group(
    group: SharedInput,
    statistics: AnalysisStatistics,
    block_size: int,
    schemes: Sequence[Scheme],
    transforms: Sequence[str],
) -> Iterator[LayerResult]:
    """
    :param group: the Linears
    :param statistics: of their input
    :param block_size: k of CAT
    :param schemes: to quantize with
    :param transforms: names in ``TRANSFORMS``
    :raises ValueError: if a weight or the input is not finite
    """
    device = get_execution_device(group.linears[group.first])
    weights, dtypes = {}, set()
    for name, linear in group.linears.items():
        with align_module_device(linear):
            weights[name] = linear.weight.detach().to(device, torch.float32)
            dtypes.add(linear.weight.dtype)
    x = statistics.sample.tokens.to(device)
    token_weights = statistics.sample.weights.to(device)
    for what, tensor in {f"The input of {group.first}": x, **weights}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has values that are not finite")

    data = GroupData(group.first, statistics, block_size, weights)
    largest = torch.linalg.vector_norm(x, dim=-1).max().item() ** 2
    mean = data.input_moments(1).sum().item()
    common = {
        "input": group.first,
        "in_features": group.in_features,
        "tokens": statistics.sample.count,
        "largest_token": largest / mean if mean else float("nan"),
    }
    # the sample knows the ratio of the energies of output and input much better than either
    scale = mean / (energy(x, token_weights) or float("nan"))
    outputs = {
        name: energy(x @ weight.T, token_weights) * scale for name, weight in weights.items()
    }
    best = _achievable(data, outputs)
    # products in the model's own dtype where that is accurate enough
    product_dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    for transform in transforms:
        insertion = TRANSFORMS[transform].compute(data)
        moments = data.input_moments(insertion.layout.block_size)
        input_energy = transformed_energy(insertion.blocks, moments)
        tokens = insertion.transform_tokens(x)
        token_channels = token_weights.float() @ tokens.square() / token_weights.sum().float()
        for name, original in weights.items():
            weight = insertion.transform_weight(original)
            measured = measured_sqnr(
                tokens,
                weight,
                [(scheme.weights, scheme.activations) for scheme in schemes],
                token_weights,
                product_dtype,
            )
            weight_channels = torch.linalg.vector_norm(weight, dim=0).square()
            weight_energy = weight_channels.double().sum().item()
            aligned = alignment(outputs[name], weight_energy, input_energy)
            # that of all schemes which differ in bits alone is the same
            weight_concentration = cache(
                partial(_concentration, weight, token_channels, row_weights=None)
            )
            token_concentration = cache(
                partial(_concentration, tokens, weight_channels, row_weights=token_weights)
            )
            for scheme, measurement in zip(schemes, measured, strict=True):
                concentrations = (
                    weight_concentration(_layout(scheme.weights)),
                    token_concentration(_layout(scheme.activations)),
                )
                predicted = predicted_sqnr(*scheme.bits, *concentrations, aligned)
                yield LayerResult(
                    layer=name,
                    out_features=original.shape[0],
                    transform=transform,
                    scheme=scheme.name,
                    block_size=insertion.layout.block_size,
                    weight_concentration_db=to_db(concentrations[0]),
                    activation_concentration_db=to_db(concentrations[1]),
                    alignment_db=to_db(aligned),
                    achievable_block_db=to_db(best[name][0]),
                    achievable_full_db=to_db(best[name][1]),
                    predicted_weights_db=to_db(predicted.weights),
                    predicted_activations_db=to_db(predicted.activations),
                    predicted_db=to_db(predicted.joint),
                    measured_weights_db=to_db(measurement.weights),
                    measured_activations_db=to_db(measurement.activations),
                    measured_db=to_db(measurement.joint),
                    **common,
                )


def _layout(args: QuantizationArgs | None) -> tuple | None:
    """All of it but the bits, on which ranges do not depend"""
    return args and (args.strategy, args.group_size, args.symmetric)


def _concentration(
    x: Tensor, channel_energies: Tensor, layout: tuple | None, row_weights: Tensor | None
) -> float:
    """
    :param channel_energies: of the other factor of the product, shape (d,)
    :return: nan if nothing is quantized
    """
    if layout is None:
        return float("nan")
    strategy, group_size, symmetric = layout
    args = QuantizationArgs(
        strategy=strategy,
        group_size=group_size,
        symmetric=symmetric,
        dynamic=strategy == QuantizationStrategy.TOKEN,
    )
    shares = channel_energies.unflatten(0, (-1, group_size or x.shape[-1])).sum(-1)
    return concentration(x, args, row_weights, shares)


def _achievable(data: GroupData, outputs: Mapping[str, float]) -> dict[str, list[float]]:
    """
    :param outputs: ``E||W x||^2`` of each Linear
    :return: of each Linear, best alignment with blocks, and with whole inputs: nan if their
        moments are not known
    """
    results: dict[str, list[float]] = {name: [] for name in outputs}
    for size in (data.block_size, data.features):
        is_known = size <= data.known_size
        root = matrix_power(data.input_moments(size), 0.5) if is_known else None
        for name, output_energy in outputs.items():
            results[name].append(
                achievable_alignment(output_energy, root, data.weight_moments(size)[name])
                if is_known
                else float("nan")
            )
    return results
