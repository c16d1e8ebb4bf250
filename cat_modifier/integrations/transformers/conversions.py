# SPDX-License-Identifier: Apache-2.0
"""
Changes of the conversions that Transformers' loader applies to the tensors of a model: names
of older checkpoints, and tensors that it splits or merges.
"""

from collections.abc import Iterable

from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from cat_modifier.checkpoint.schema import TRANSFORM_NAME

__all__ = ["with_whole_transforms", "without_fusing"]


def without_fusing(
    conversions: Iterable[WeightTransform], fused: Iterable[str]
) -> list[WeightTransform]:
    """
    Leave out conversions that make fused parameters of the tensors of single experts.

    :param conversions: conversions of tensors in the loader of the model
    :param fused: names of parameters that the model no longer has
    """
    return [
        conversion
        for conversion in conversions
        if not isinstance(conversion, WeightConverter)
        or not any(pattern in name for pattern in conversion.target_patterns for name in fused)
    ]


def with_whole_transforms(
    conversions: Iterable[WeightTransform], owners: Iterable[str]
) -> list[WeightTransform]:
    """
    Add renamings of transforms that conversions would split. Renamings come first, wherever
    they are in the list.

    A Linear that a checkpoint holds merged (`Wqkv`) is split among several Linears. Their
    transform is one tensor, which the file holds beside the merged Linear.

    :param conversions: conversions of tensors in the loader of the model
    :param owners: names of the Linears of the model that hold transforms
    """
    conversions, owners = list(conversions), [f".{name}" for name in owners]
    renamings = []
    for one in conversions:
        if not isinstance(one, WeightConverter) or len(one.target_patterns) == 1:
            continue
        parts = [pattern.removesuffix(".weight") for pattern in one.target_patterns]
        parts = [part for part in parts if any(name.endswith(f".{part}") for name in owners)]
        for source in one.source_patterns:
            source = source.removesuffix(".weight")
            for part in parts[:1]:
                renaming = WeightRenaming(
                    f"{source}.{TRANSFORM_NAME}", f"{part}.{TRANSFORM_NAME}"
                )
                renaming.scope_prefix = one.scope_prefix
                renaming.base_model_prefix = one.base_model_prefix
                renamings.append(renaming)
    return conversions + renamings
