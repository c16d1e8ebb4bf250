# SPDX-License-Identifier: Apache-2.0
"""
A dry run: what a recipe would make of a model, without its weights.

The modifiers of the recipe decide: they are initialized on a model of random weights, and
CATModifier observes it on one short text.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import patch_attr
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers import Modifier
from torch import Tensor
from torch.nn import Linear
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel

from cat_modifier.checkpoint.integers import bits_name
from cat_modifier.checkpoint.schema import TENSOR_SUFFIX
from cat_modifier.markdown import markdown_table
from cat_modifier.modifiers.cat.base import CATModifier
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan
from cat_modifier.modifiers.forward import as_it_is_run
from cat_modifier.quantize.sizes import quantized_linear, stored_bytes
from cat_modifier.quantize.skeleton import fill, make_empty

__all__ = ["LinearOutline", "Outline", "outline", "outline_table"]

_TOKENS = 32
"""Length of the text. Experts that it does not reach are transformed all the same"""


@dataclass(frozen=True)
class LinearOutline:
    """
    What becomes of one Linear.

    :param name: full name
    :param shape: (out, in)
    :param scheme: its bits, as W4A4; empty if it is not quantized
    :param blocks: channels per block of the transform of its input; empty for none
    :param hadamard: size of its Hadamard product; empty for none
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    blocks: str = ""
    hadamard: str = ""

    @property
    def parent(self) -> str:
        """
        Name of the module around it, within its layer of the language model, with * for the
        numbers of experts
        """
        parent = self.name.removeprefix("model.").rpartition(".")[0]
        parent = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parent)
        return re.sub(r"^(language_model\.)?layers\.\*\.", "", parent)


@dataclass(frozen=True)
class Outline:
    """
    What a recipe makes of a model.

    :param linears: all Linears, in the order of the model
    :param bytes_before: size of the model's weights
    :param bytes_after: size of the checkpoint's weights, transforms included
    :param transform_bytes: size of the transforms
    :param overhead: multiply-adds of the transforms over those of the transformed Linears
    :param is_upper_bound: whether blocks may become smaller, by `max_overhead`
    """

    linears: list[LinearOutline]
    bytes_before: int
    bytes_after: int
    transform_bytes: int
    overhead: float
    is_upper_bound: bool


def outline(config: PreTrainedConfig, recipe: str) -> Outline:
    """
    Find out what a recipe would make of a model.

    :param config: config of the model
    :param recipe: path of a YAML file
    :raises ValueError: if the recipe does not suit the model, or the model cannot be run with
        random weights. The error that tells why is its cause
    """
    model = make_empty(config)
    tensors = dict(model.state_dict(keep_vars=True))
    fill(model)
    try:
        return _observe(model, tensors, config, recipe)
    except (RuntimeError, TypeError, IndexError, KeyError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"A dry run of {type(model).__name__} is not possible: random weights and a short "
            f"text end in an error ({reason}). Leave out --dry-run"
        ) from error


def _observe(
    model: PreTrainedModel, tensors: dict[str, Tensor], config: PreTrainedConfig, recipe: str
) -> Outline:
    """
    Let the modifiers of a recipe decide.

    :param model: model filled with random numbers
    :param tensors: its tensors before it was filled, by name
    """
    data: Any = [{"input_ids": _some_text(config)}]
    loader: DataLoader = DataLoader(data, batch_size=1)
    inputs: list[InputToPlan] = []
    with create_session() as session, moe_calibration_context():  # as in oneshot
        session.initialize(recipe=recipe, model=model, calib_data=loader, start=-1)
        modifiers: list[Modifier] = session.lifecycle.recipe.modifiers
        for modifier in modifiers:
            if isinstance(modifier, CATModifier):
                # as in the pipeline `independent`
                with patch_attr(session.lifecycle.recipe, "modifiers", [modifier]):
                    inputs += modifier.outline(session.state)
                    modifier.on_finalize(session.state)  # chooses the format
    counts = _count_tokens(model, data[0]["input_ids"])
    return _describe(model, tensors, inputs, modifiers, counts)


def _some_text(config: PreTrainedConfig) -> Tensor:
    """Make token ids, shape (tokens,), without those that stand for pictures"""
    special = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    size = config.get_text_config().vocab_size
    ids = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    ordinary = [i for i in ids[: _TOKENS + len(special)] if i not in special]
    return torch.tensor(ordinary[:_TOKENS])


def _describe(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    inputs: list[InputToPlan],
    modifiers: list[Modifier],
    counts: Counter[str],
) -> Outline:
    """
    :param tensors: empty tensors of the model before it was filled, by name
    :param inputs: inputs that CATModifier transforms
    :param counts: tokens that each Linear reads of a text
    """
    input_of = {name: one for one in inputs for name in one.names}
    linears, after = [], dict(tensors)
    for name, linear in model.named_modules():
        if not isinstance(linear, Linear):
            continue
        scheme: QuantizationScheme | None = getattr(linear, "quantization_scheme", None)
        bits = ""
        if scheme is not None:
            bits = bits_name(scheme.weights, scheme.input_activations)
            dtype = tensors[f"{name}.weight"].dtype
            for part in ("weight", "bias"):
                after.pop(f"{name}.{part}", None)
            for part, tensor in quantized_linear(linear, dtype, scheme).items():
                after[f"{name}.{part}"] = tensor
        transform = input_of.get(name)
        linears.append(
            LinearOutline(
                name,
                (linear.out_features, linear.in_features),
                bits,
                *(("", "") if transform is None else _sizes(transform)),
            )
        )
    cat = [one for one in modifiers if isinstance(one, CATModifier)]
    transforms = {}
    for one in inputs:
        if one.value_projection is None:
            size = one.layout.stored_size
            shape = (one.in_features // size, size, size)
            precision = cat[0].precision
            dtype = torch.int8 if precision == "auto" else precision
            transforms[one.first + TENSOR_SUFFIX] = torch.empty(
                shape, dtype=dtype, device="meta"
            )
    sizes = {one.name: one.shape for one in linears}
    return Outline(
        linears,
        stored_bytes(tensors),
        stored_bytes(after | transforms),
        stored_bytes(transforms),
        _overhead(inputs, sizes, counts),
        any(one.max_overhead is not None for one in cat),
    )


@torch.no_grad()
def _count_tokens(model: PreTrainedModel, ids: Tensor) -> Counter[str]:
    """Count the tokens that each Linear reads of a text; experts read those routed to them"""
    counts: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):

            def count(linear: Linear, args: tuple, name: str = name):
                counts[name] += args[0].numel() // linear.in_features

            handles.append(module.register_forward_pre_hook(count))
    try:
        with as_it_is_run(model):
            model(input_ids=ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _overhead(
    inputs: list[InputToPlan], shapes: dict[str, tuple[int, int]], counts: Counter[str]
) -> float:
    """Relate the multiply-adds of transforms to those of their Linears, for the same tokens"""
    added = total = 0
    for one in inputs:
        # experts that share an input share its transform: a token is transformed once
        tokens = min(_TOKENS, sum(counts[name] for name in one.names))
        fused = one.value_projection is not None
        added += tokens * one.layout.multiply_adds(one.in_features, fused)
        total += sum(counts[name] * math.prod(shapes[name]) for name in one.names)
    return added / total if total else 0.0


def _sizes(one: InputToPlan) -> tuple[str, str]:
    """Name the sizes of a transform's blocks and of its Hadamard product"""
    layout = one.layout
    fused = " fused" if one.value_projection is not None else ""
    hadamard = layout.hadamard_size
    return f"{layout.stored_size}{fused}", str(hadamard) if hadamard > 1 else ""


def outline_table(found: Outline) -> str:
    """Write a table with a row for each kind of Linear, and what the checkpoint will weigh"""
    kinds: dict[tuple, dict[str, int]] = {}
    for one in found.linears:
        key = (one.parent, one.shape[1], one.blocks, one.hadamard, one.scheme or "16")
        names = kinds.setdefault(key, {})
        name = one.name.rpartition(".")[2]
        names[name] = names.get(name, 0) + 1
    rows = [
        (".".join(filter(None, (parent, _join(list(names))))), str(sum(names.values())))
        + (str(size), *others)
        for (parent, size, *others), names in kinds.items()
    ]
    bound = "at most " if found.is_upper_bound else ""
    lines = [
        markdown_table(("Linears", "count", "inputs", "blocks", "Hadamard", "bits"), rows),
        "",
        f"weights: {_megabytes(found.bytes_before)} -> {bound}{_megabytes(found.bytes_after)}",
    ]
    if found.transform_bytes:
        lines.append(
            f"transforms: {bound}{_megabytes(found.transform_bytes)} of these, and "
            f"{bound}{found.overhead:.1%} more multiply-adds than their Linears"
        )
    return "\n".join(lines)


def _join(names: list[str]) -> str:
    """Join q_proj and k_proj to q/k_proj"""
    parts = [name.rpartition("_") for name in names]
    if len(names) > 1 and all(head and tail == parts[0][2] for head, _, tail in parts):
        return "/".join(head for head, _, _ in parts) + f"_{parts[0][2]}"
    return "/".join(names)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
