# SPDX-License-Identifier: Apache-2.0
"""From the patterns in CATModifier's options to modules."""

from collections.abc import Mapping

from compressed_tensors import match_modules_set, match_named_modules
from compressed_tensors.offload import OffloadCache
from loguru import logger
from torch.nn import Linear, Module
from transformers.pytorch_utils import Conv1D

from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE

__all__ = ["match_linears", "match_mappings"]


def match_linears(model: Module, targets: list[str], ignore: list[str]) -> dict[str, Linear]:
    """
    Find the Linears to transform.

    :param targets: names, classes or `re:` patterns
    :param ignore: exceptions from `targets`
    :return: Linears by full name
    :raises ValueError: if no module matches, or a matching module cannot have a transform
    """
    matched = dict(match_named_modules(model, targets, ignore))
    if not matched:
        conv1d = next(
            (name for name, one in model.named_modules() if isinstance(one, Conv1D)), None
        )
        reason = "check the names with `model.named_modules()`"
        if ignored := [name for name, _ in match_named_modules(model, targets)]:
            reason = (
                f"all {len(ignored)} targets are ignored, for example {ignored[0]}. Set "
                "`ignore` of CATModifier, and of the modifier that quantizes, to what this "
                "model must keep, as ['re:.*classifier.*']"
            )
        if conv1d is not None:
            reason = (
                f"the model holds its weights in Conv1D modules ({conv1d}), which neither "
                "llm-compressor nor CATModifier quantizes"
            )
        raise ValueError(
            f"CATModifier found no modules for targets {targets} and ignore {ignore}: {reason}"
        )
    for pattern in ignore:
        if pattern not in DEFAULT_IGNORE and not any(match_named_modules(model, [pattern])):
            logger.warning(f"`ignore` of CATModifier: no module matches {pattern}")
    first_of: dict[int, str] = {}
    for name, module in matched.items():
        if not isinstance(module, Linear):
            raise ValueError(
                f"CATModifier can transform the inputs of torch.nn.Linear, but {name} is a "
                f"{type(module).__name__}: add it to `ignore`"
            )
        with OffloadCache.disable_onloading():  # onloading would make a copy
            first = first_of.setdefault(id(module.weight), name)
        if first != name:
            raise ValueError(
                f"{name} and {first} share their weight, so that their inputs cannot have "
                "transforms of their own: add both to `ignore`"
            )
    return matched


def match_mappings(
    model: Module, mappings: list[list[str]], ignore: list[str], linears: Mapping[str, Linear]
) -> list[list[str]]:
    """
    Find the Linears that share an input according to `mappings`.

    :param mappings: lists of patterns, one list for each input
    :param linears: targeted Linears by full name
    :return: names of the Linears of each input
    :raises ValueError: if a mapping matches nothing, modules that are not targeted, or
        Linears that cannot read the same input
    """
    names = {linear: name for name, linear in linears.items()}
    inputs = []
    for mapping in mappings:
        matches = list(match_modules_set(model, mapping, ignore))
        if not matches:
            raise ValueError(
                f"No modules match the mapping {mapping} of CATModifier: check the names with "
                "`model.named_modules()`"
            )
        for match in matches:
            members = [module for modules in match for module in modules]
            if unknown := [module for module in members if module not in names]:
                raise ValueError(
                    f"The mapping {mapping} of CATModifier matches {unknown[0]}, which is "
                    "not among its `targets`: extend `targets`, or change the mapping"
                )
            if len({linear.in_features for linear in members}) > 1:
                raise ValueError(
                    f"The mapping {mapping} of CATModifier matches Linears of different input "
                    "sizes, which cannot read the same input: use one mapping per input"
                )
            inputs.append([names[module] for module in members])
    return inputs
