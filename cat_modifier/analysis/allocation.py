# SPDX-License-Identifier: Apache-2.0
"""
Mixed precision: choose the Linears that get more bits, from the report of an analysis.

The goal is a small sum of the noise-to-signal ratios of all Linears. Bits go where they
reduce the sum most per cost. Linears that read the same input get the same scheme, because
serving engines merge them. Bits of weights and bits of activations cost the same.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE
from cat_modifier.functional.knapsack import spend

__all__ = ["allocate", "config_group", "make_recipe", "mean_bits", "run"]

_SERVED = ("W4A4", "W4A8", "W8A8")
"""Schemes that vLLM serves, by rising bits"""


def _bits(scheme: str) -> float:
    return sum(bits or 16 for bits in Scheme.parse(scheme).bits) / 2


def _linears(frame: pd.DataFrame) -> pd.DataFrame:
    """Make a table of one row per Linear, with `size`, its multiply-adds for one token"""
    linears = frame.drop_duplicates("layer").set_index("layer")
    return linears.assign(size=linears["in_features"] * linears["out_features"])


def mean_bits(frame: pd.DataFrame, allocation: dict[str, list[str]]) -> float:
    """Compute the mean bits of a factor of a multiply-add"""
    sizes = _linears(frame)["size"]
    total = sum(_bits(name) * sizes[layers].sum() for name, layers in allocation.items())
    return total / sizes.sum()


def allocate(frame: pd.DataFrame, bits: float, transform: str = "cat") -> dict[str, list[str]]:
    """
    Choose a scheme for each Linear.

    :param frame: rows of :func:`cat_modifier.analysis.layers.analyze`
    :param bits: upper bound of :func:`mean_bits`
    :param transform: transform of the planned model
    :return: names of the Linears of each scheme, in the order of the model
    :raises ValueError: if the frame lacks the transform or the schemes, or if even the
        smallest scheme has more bits
    """
    transforms = frame["transform"].unique()
    if transform not in transforms:
        raise ValueError(
            f"The report has no transform {transform!r}: choose one of {', '.join(transforms)}"
        )
    frame = frame[frame["transform"] == transform]
    names = [name for name in _SERVED if name in set(frame["scheme"])]
    if len(names) < 2:
        raise ValueError(
            f"The report needs two schemes of {', '.join(_SERVED)}: repeat `cat-modifier "
            "analyze` with --schemes"
        )
    linears = _linears(frame)
    noise = 10 ** (-frame.pivot(index="layer", columns="scheme", values="measured_db") / 10)
    noise = noise[names].groupby(linears["input"]).sum()
    sizes = linears.groupby("input")["size"].sum()
    options = [
        [(_bits(name) * sizes[shared], row[name]) for name in names]
        for shared, row in noise.iterrows()
    ]
    indices = spend(options, bits * sizes.sum())
    if indices is None:
        raise ValueError(
            f"{names[0]}, the smallest scheme of the report, takes more than {bits} bits: "
            "raise --bits"
        )
    chosen = pd.Series([names[index] for index in indices], noise.index)
    chosen = linears["input"].map(chosen)
    return {name: list(chosen.index[chosen == name]) for name in names if name in set(chosen)}


def _patterns(layers: list[str]) -> list[str]:
    """
    Make `targets` that match exactly these Linears.

    They also match the names in other libraries, which differ before the layer's number.
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
    """Make a config group of llm-compressor, for vLLM and a scheme such as `W4A8`"""
    parsed = Scheme.parse(scheme)
    both = [args for args in (parsed.weights, parsed.activations) if args is not None]
    keys = {"num_bits", "type", "symmetric", "strategy", "dynamic"}
    weights, activations = (args.model_dump(mode="json", include=keys) for args in both)
    return {
        "targets": targets,
        "format": "pack-quantized" if weights["num_bits"] < 8 else "int-quantized",
        "weights": weights | {"observer": "memoryless_mse"},
        "input_activations": activations,
    }


def make_recipe(
    allocation: dict[str, list[str]],
    transform: str = "cat",
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = DEFAULT_IGNORE,
    transform_block_size: int = 128,
) -> dict[str, Any]:
    """
    Make a recipe of CATModifier and llm-compressor's QuantizationModifier.

    :param allocation: Linears of each scheme, see :func:`allocate`
    :param transform: transform of the model to make
    :param targets: the analysis' own, as `ignore` and `transform_block_size`
    :raises ValueError: if CATModifier cannot make the transform
    """
    options = TRANSFORMS[transform].options
    if options is None:
        raise ValueError(
            f"CATModifier cannot make the transform {transform!r}: choose another one of the "
            "report with --transform"
        )
    modifiers: dict[str, Any] = {}
    if options:
        modifiers["CATModifier"] = {
            "transform_block_size": transform_block_size,
            **options,
            "targets": list(targets),
            "ignore": list(ignore),
        }
    groups = {s.lower(): config_group(s, _patterns(p)) for s, p in allocation.items()}
    modifiers["QuantizationModifier"] = {"ignore": list(ignore), "config_groups": groups}
    return {"quant_stage": {"quant_modifiers": modifiers}}


def run(report: Path, bits: float, transform: str, output: Path, overwrite: bool):
    """
    Run `cat-modifier allocate`; see its help for the parameters.

    :raises ValueError: if the report or the arguments do not fit
    :raises OSError: if a file cannot be read or written
    """
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"{output} exists: choose another --output, or replace it with --overwrite"
        )
    path = report / "layers.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{report} holds no report: make one with `cat-modifier analyze MODEL --output "
            f"{report}`"
        )
    content = json.loads(path.read_text())
    if "layers" not in content or "transform" not in content["layers"][0]:
        raise ValueError(
            f"{path} is not a report of a model before its quantization: make one with "
            "`cat-modifier analyze MODEL`, without --original"
        )
    frame = pd.DataFrame(content["layers"])
    allocation = allocate(frame, bits, transform)
    settings = {
        key: content["settings"][key] for key in ("targets", "ignore", "transform_block_size")
    }
    recipe = make_recipe(allocation, transform, **settings)
    text = yaml.safe_dump(recipe, sort_keys=False, width=1000)
    mean = mean_bits(frame, allocation)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"# By `cat-modifier allocate`: {mean:.2f} bits\n{text}")
    sizes = _linears(frame)["size"]
    for name, layers in allocation.items():
        share = sizes[layers].sum() / sizes.sum()
        print(f"{name}: {len(layers)} of {len(sizes)} Linears, {share:.0%} of multiply-adds")
    print(f"The recipe, of {mean:.2f} bits, is in {output}")
