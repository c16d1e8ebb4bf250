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


def with_whole_transforms(conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """
    Add renamings of transforms that conversions would split. Renamings come first, wherever
    they are in the list.

    A Linear that an older checkpoint holds merged (`Wqkv`) is split among several Linears.
    Their transform is one tensor, which belongs to the first.

    :param conversions: conversions of tensors in the loader of the model
    """
    conversions = list(conversions)
    renamings = []
    for one in conversions:
        if not isinstance(one, WeightConverter) or len(one.target_patterns) == 1:
            continue
        for source in one.source_patterns:
            renaming = WeightRenaming(
                f"{source}.{TRANSFORM_NAME}", f"{one.target_patterns[0]}.{TRANSFORM_NAME}"
            )
            renaming.scope_prefix = one.scope_prefix
            renaming.base_model_prefix = one.base_model_prefix
            renamings.append(renaming)
    return conversions + renamings
