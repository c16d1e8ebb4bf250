# SPDX-License-Identifier: Apache-2.0
"""
Mixed precision: which Linears get more bits, chosen from the report of an analysis.

The noise-to-signal ratios of all Linears are summed, and go down by what gives most for the
bits it costs, until the budget is spent. Linears which read the same input stay together, as
serving engines merge them. Bits of activations count as those of weights: both factors of a
multiply-add are counted, on the hardware which has a product for them.
"""

import json
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from cat_modifier.analysis.schemes import Scheme
from cat_modifier.calibration.shared_inputs import DEFAULT_IGNORE
from cat_modifier.functional.knapsack import spend

__all__ = ["allocate", "config_group", "make_recipe", "mean_bits", "run"]

_SERVED_BITS = (4, 8)


def _bits(scheme: str) -> float:
    """Mean of those of weights and of activations"""
    return sum(Scheme.parse(scheme).bits) / 2


def mean_bits(frame: pd.DataFrame, allocation: dict[str, list[str]]) -> float:
    """Of the factors of all multiply-adds"""
    sizes = _sizes(frame)
    total = sum(_bits(name) * sizes[layers].sum() for name, layers in allocation.items())
    return total / sizes.sum()


def _sizes(frame: pd.DataFrame) -> pd.Series:
    """Multiply-adds of each Linear for a token"""
    linears = frame.drop_duplicates("layer").set_index("layer")
    return linears["in_features"] * linears["out_features"]


def allocate(frame: pd.DataFrame, bits: float, transform: str = "cat") -> dict[str, list[str]]:
    """
    :param frame: of :func:`cat_modifier.analysis.layers.analyze`
    :param bits: mean over the factors of all multiply-adds, at most
    :param transform: which the model will have
    :return: Linears of each scheme, in the order of the model
    :raises ValueError: if the frame lacks the transform or schemes to choose from, or if even
        the smallest scheme takes more bits
    """
    frame = frame[frame["transform"] == transform]
    names = [
        name
        for name in frame["scheme"].unique()
        if "G" not in name and set(Scheme.parse(name).bits) <= set(_SERVED_BITS)
    ]
    names.sort(key=_bits)
    if len(names) < 2:
        raise ValueError(
            f"The report needs the transform {transform!r}, and two schemes of W4A4, W4A8, W8A8"
        )

    noise = 10 ** (-frame.pivot(index="layer", columns="scheme", values="measured_db") / 10)
    inputs = frame.drop_duplicates("layer").set_index("layer")["input"]
    noise = noise[names].groupby(inputs).sum()
    sizes = _sizes(frame).groupby(inputs).sum()
    options = [
        [(_bits(name) * sizes[unit], noise.at[unit, name]) for name in names]
        for unit in noise.index
    ]
    indices = spend(options, bits * sizes.sum())
    if indices is None:
        raise ValueError(f"{names[0]}, the least of the report, takes more than {bits} bits")
    chosen = dict(zip(noise.index, indices, strict=True))
    allocation = defaultdict(list)
    for layer, unit in inputs.items():
        allocation[names[chosen[unit]]].append(layer)
    return {name: allocation[name] for name in names if name in allocation}


def _patterns(layers: list[str]) -> list[str]:
    """
    Targets which match these Linears and no others, also under the names of other libraries:
    those differ in what is before the number of a layer
    """
    numbers, patterns = defaultdict(list), []
    for layer in layers:
        match = re.fullmatch(r"(?:.*?\.)??([^.]+)\.(\d+)\.(.+)", layer)
        if match is None:
            patterns.append(f"re:(.*\\.)?{re.escape(layer)}$")
        else:
            numbers[match[1], match[3]].append(match[2])
    for (parent, rest), found in numbers.items():
        choice = found[0] if len(found) == 1 else f"({'|'.join(found)})"
        patterns.append(f"re:(.*\\.)?{re.escape(parent)}\\.{choice}\\.{re.escape(rest)}$")
    return patterns


def config_group(scheme: str, targets: list[str]) -> dict[str, Any]:
    """
    :param scheme: as `W4A8`
    :param targets: Linears
    :return: config group of llm-compressor which vLLM serves
    """
    weights, inputs = Scheme.parse(scheme).bits
    return {
        "targets": targets,
        "format": "pack-quantized" if weights < 8 else "int-quantized",
        "weights": {
            "num_bits": weights,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
            "observer": "memoryless_mse",
        },
        "input_activations": {
            "num_bits": inputs,
            "type": "int",
            "symmetric": False,
            "strategy": "token",
            "dynamic": True,
        },
    }


def make_recipe(allocation: dict[str, list[str]]) -> dict[str, Any]:
    """
    :param allocation: of :func:`allocate`
    :return: recipe of CATModifier and llm-compressor's QuantizationModifier
    """
    groups = {
        name.lower(): config_group(name, _patterns(layers))
        for name, layers in allocation.items()
    }
    quantization = {"ignore": list(DEFAULT_IGNORE), "config_groups": groups}
    modifiers = {"CATModifier": {}, "QuantizationModifier": quantization}
    return {"quant_stage": {"quant_modifiers": modifiers}}


def run(args: Namespace):
    """
    `cat-modifier allocate`

    :raises ValueError: if the report cannot be used, or the budget not be met
    :raises OSError: if a file cannot be read or written
    """
    path = Path(args.report) / "layers.json"
    content = json.loads(path.read_text())
    if "layers" not in content or "transform" not in content["layers"][0]:
        raise ValueError(f"{path} is not of a model which is not quantized yet")
    frame = pd.DataFrame(content["layers"])
    allocation = allocate(frame, args.bits, args.transform)
    recipe = yaml.safe_dump(make_recipe(allocation), sort_keys=False, width=1000)
    bits = mean_bits(frame, allocation)
    Path(args.output).write_text(f"# By `cat-modifier allocate`: {bits:.2f} bits\n{recipe}")
    table = Table("scheme", "Linears", "share of multiply-adds")
    sizes = _sizes(frame)
    for name, layers in allocation.items():
        share = sizes[layers].sum() / sizes.sum()
        table.add_row(name, str(len(layers)), f"{share:.0%}")
    console = Console()
    console.print(table)
    message = f"The recipe, of {bits:.2f} bits, is in {args.output}"
    console.print(message, markup=False, highlight=False)
