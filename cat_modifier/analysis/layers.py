# SPDX-License-Identifier: Apache-2.0
"""The analysis itself: from a model and data to a table of numbers"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
import tqdm
from compressed_tensors import match_named_modules
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.utils import align_module_device, get_execution_device
from torch import Tensor
from torch.nn import Linear, Module

from cat_modifier.analysis.experts import fused_experts
from cat_modifier.analysis.passes import Batch, calibrate
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.statistics import AnalysisStatistics
from cat_modifier.analysis.transforms import TRANSFORMS, GroupData
from cat_modifier.analysis.workspace import Workspace
from cat_modifier.calibration.groups import InputGroup
from cat_modifier.mathematics.geometry import choose_geometry
from cat_modifier.mathematics.sqnr import (
    achievable_alignment,
    alignment,
    concentration,
    energy,
    measured_sqnr,
    predicted_sqnr,
    to_db,
)
from cat_modifier.mathematics.transform import Rotation, matrix_power, transformed_energy

__all__ = [
    "DEFAULT_IGNORE",
    "DEFAULT_SCHEMES",
    "DEFAULT_TRANSFORMS",
    "LayerResult",
    "UnseenLinears",
    "analyze",
    "find_linears",
]

DEFAULT_SCHEMES = ("W4A4", "W4A8", "W8A8", "W6A6")
DEFAULT_TRANSFORMS = tuple(
    name for name, transform in TRANSFORMS.items() if not transform.needs_whole_moments
)
DEFAULT_IGNORE = ("re:.*lm_head", "re:.*vision.*", "re:.*visual.*")
"""As CATModifier's"""

_SAMPLE_SIZE = 128
"""Tokens of each input on which SQNR is measured"""


class UnseenLinears(ValueError):
    """
    Some Linears saw no tokens.

    :param names: of them
    :param results: of all others; None if there are none
    """

    def __init__(self, names: list[str], results: Any):
        self.names, self.results = names, results
        super().__init__(
            f"{len(names)} Linears saw no tokens, and are not in the results: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Use more data, or add "
            "them to `ignore`"
        )


@dataclass(frozen=True)
class LayerResult:
    """
    One Linear under one transform and one scheme. Ratios of energies are in dB, as
    ``10 log10``: all names that end in `_db`. They are defined in
    :mod:`cat_modifier.mathematics.sqnr`.

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


def find_linears(
    model: Module, targets: Iterable[str] = ("Linear",), ignore: Iterable[str] = DEFAULT_IGNORE
) -> dict[str, Linear]:
    """
    :param targets: by name, class or `re:` pattern, as in llm-compressor
    :param ignore: exceptions from `targets`
    :return: by full name, in the order of the model
    :raises ValueError: if there are none
    """
    linears = {
        name: module
        for name, module in match_named_modules(model, targets, ignore)
        if isinstance(module, Linear)
    }
    if not linears:
        raise ValueError(
            f"The model has no torch.nn.Linear for targets {list(targets)} and ignore "
            f"{list(ignore)}: check the names with `model.named_modules()`"
        )
    return linears


def analyze(
    model: Module,
    batches: Sequence[Batch],
    schemes: Sequence[str] = DEFAULT_SCHEMES,
    transforms: Sequence[str] = DEFAULT_TRANSFORMS,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = DEFAULT_IGNORE,
    block_size: int = 128,
    workspace: Workspace | None = None,
) -> pd.DataFrame:
    """
    Predict and measure the quantization error of every Linear, under each transform and
    scheme, in one pass over the data.

    :param model: any module; Linears are found, and grouped by the input that they read
    :param batches: what the model is called with: token ids, or keyword arguments
    :param schemes: see :meth:`Scheme.parse`
    :param transforms: names in ``TRANSFORMS``
    :param targets: Linears, by name, class or `re:` pattern
    :param ignore: exceptions from `targets`
    :param block_size: of CAT, as in CATModifier
    :param workspace: keeps what was computed, so that it can be resumed
    :return: one row for each :class:`LayerResult`
    :raises ValueError: for unknown names, if there are no Linears or no data, if experts are
        not Linears, or if activations are not finite
    :raises UnseenLinears: if some of the Linears saw no tokens; it holds the results
    """
    schemes = [Scheme.parse(name) for name in schemes]
    if unknown := [name for name in transforms if name not in TRANSFORMS]:
        raise ValueError(
            f"Unknown transform {unknown[0]!r}: it should be one of {', '.join(TRANSFORMS)}"
        )
    if not schemes or not transforms or not len(batches):
        raise ValueError("The analysis needs a scheme, a transform and a batch at least")
    if block_size < 1:
        raise ValueError(f"`block_size` must be positive, got {block_size}")
    if fused := fused_experts(model, ignore):
        raise ValueError(
            f"{fused[0]} (one of {len(fused)}) holds all experts in one parameter, not in "
            "Linears: call `llmcompressor.modeling.moe.linearize.linearize_moe(model)` first, "
            "or add it to `ignore`"
        )
    linears = find_linears(model, targets, ignore)
    _check_groups(linears, schemes)

    needs_whole_moments = any(TRANSFORMS[name].needs_whole_moments for name in transforms)

    def block_size_of(group: InputGroup) -> int:
        geometry = choose_geometry(group.owner, group.features, 1, block_size, Rotation.NONE)
        return geometry.block_size

    def new_statistics(group: InputGroup) -> AnalysisStatistics:
        known = group.features if needs_whole_moments else block_size_of(group)
        return AnalysisStatistics(group.features, known, _SAMPLE_SIZE)

    calibration = calibrate(model, linears, batches, new_statistics, workspace)
    rows = workspace.load_rows() if workspace is not None else {}
    for group in tqdm.tqdm(calibration.pending_groups(), desc="Measuring"):
        statistics = calibration.take(group)
        if group.owner in rows or not statistics.sample.count:
            continue
        results = _measure_group(group, statistics, block_size_of(group), schemes, transforms)
        rows[group.owner] = results = [asdict(result) for result in results]
        if workspace is not None:
            workspace.add_rows(group.owner, results)

    frame = pd.DataFrame([row for results in rows.values() for row in results])
    seen = set(frame["layer"]) if len(frame) else set()
    if unseen := [name for name in linears if name not in seen]:
        raise UnseenLinears(unseen, frame if len(frame) else None)
    position = {name: index for index, name in enumerate(linears)}
    return frame.sort_values("layer", key=lambda names: names.map(position), kind="stable")


def _check_groups(linears: dict[str, Linear], schemes: Sequence[Scheme]):
    """Before the pass over the data: whether groups of channels divide all inputs"""
    for scheme in schemes:
        for args in (scheme.weights, scheme.activations):
            size = args and args.group_size
            for name, linear in linears.items():
                if size and linear.in_features % size:
                    raise ValueError(
                        f"Groups of {size} channels (scheme {scheme.name}) do not divide the "
                        f"{linear.in_features} inputs of {name}: choose another size, or add "
                        "the Linear to `ignore`"
                    )


@torch.no_grad()
def _measure_group(
    group: InputGroup,
    statistics: AnalysisStatistics,
    block_size: int,
    schemes: Sequence[Scheme],
    transforms: Sequence[str],
) -> Iterable[LayerResult]:
    device = get_execution_device(group.linears[group.owner])
    weights, dtypes = {}, set()
    for name, linear in group.linears.items():
        with align_module_device(linear):
            weights[name] = linear.weight.detach().to(device, torch.float32)
            dtypes.add(linear.weight.dtype)
    x = statistics.sample.tokens.to(device)
    token_weights = statistics.sample.weights.to(device)
    for what, tensor in {f"The input of {group.owner}": x, **weights}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has values that are not finite")

    data = GroupData(group.owner, statistics, block_size, weights)
    largest = torch.linalg.vector_norm(x, dim=-1).max().item() ** 2
    mean = data.input_moments(1).sum().item()
    common = {
        "input": group.owner,
        "in_features": group.features,
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
        moments = data.input_moments(insertion.blocks.shape[-1])
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
                    block_size=insertion.blocks.shape[-1],
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
