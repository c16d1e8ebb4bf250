# SPDX-License-Identifier: Apache-2.0
"""Which Linears the options of CATModifier name"""

from collections.abc import Mapping

from compressed_tensors import match_modules_set, match_named_modules
from compressed_tensors.offload import OffloadCache
from torch.nn import Linear, Module

__all__ = ["match_linears", "match_mappings"]


def match_linears(model: Module, targets: list[str], ignore: list[str]) -> dict[str, Linear]:
    """
    :return: by name
    :raises ValueError: if there are none, or if one of them cannot have a transform
    """
    matched = dict(match_named_modules(model, targets, ignore))
    if not matched:
        raise ValueError(
            f"CATModifier found no modules for targets {targets} and ignore {ignore}: check "
            "the names with `model.named_modules()`"
        )
    owners: dict[int, str] = {}
    for name, module in matched.items():
        if not isinstance(module, Linear):
            raise ValueError(
                f"CATModifier can transform the inputs of torch.nn.Linear, but {name} is a "
                f"{type(module).__name__}: add it to `ignore`"
            )
        with OffloadCache.disable_onloading():  # onloading would make a copy
            owner = owners.setdefault(id(module.weight), name)
        if owner != name:
            raise ValueError(
                f"{name} and {owner} share their weight, so that their inputs cannot have "
                "transforms of their own: add both to `ignore`"
            )
    return matched


def match_mappings(
    model: Module, mappings: list[list[str]], ignore: list[str], linears: Mapping[str, Linear]
) -> list[list[str]]:
    """
    :param mappings: patterns, a list for each group
    :param linears: which are targeted, by name
    :return: names of each group
    :raises ValueError: if a mapping matches nothing, other modules than these, or Linears
        that cannot read the same input
    """
    names = {linear: name for name, linear in linears.items()}
    groups = []
    for mapping in mappings:
        matches = list(match_modules_set(model, mapping, ignore))
        if not matches:
            raise ValueError(f"No modules match the mapping {mapping} of CATModifier")
        for match in matches:
            members = [module for modules in match for module in modules]
            if unknown := [module for module in members if module not in names]:
                raise ValueError(
                    f"The mapping {mapping} of CATModifier matches {unknown[0]}, which is "
                    "not among its `targets`"
                )
            if len({linear.in_features for linear in members}) > 1:
                raise ValueError(
                    f"The mapping {mapping} of CATModifier matches Linears of different "
                    "input sizes, which cannot read the same input"
                )
            groups.append([names[module] for module in members])
    return groups
