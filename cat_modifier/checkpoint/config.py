# SPDX-License-Identifier: Apache-2.0
"""
The part of ``config.json`` that describes the online transforms of a checkpoint.

A CAT checkpoint is a compressed-tensors checkpoint whose ``quantization_config`` differs
in two places. Its ``transform_config`` is a :class:`CATTransformConfig`, which a stock
reader of transforms refuses because of fields it does not know. And the ``format`` of
every config group carries a prefix, which a reader that ignores ``transform_config``
refuses because it is no known format. Both refusals name this package: weights that
expect transformed inputs must never be run without the transform.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
from compressed_tensors.transform import (
    TransformArgs,
    TransformConfig,
    TransformLocation,
    TransformScheme,
)
from compressed_tensors.utils import TorchDtype
from pydantic import Field, ValidationError, model_validator

from cat_modifier.mathematics.hadamard import is_hadamard_order

__all__ = [
    "CATScheme",
    "CATTransformConfig",
    "TENSOR_SUFFIX",
    "TRANSFORM_NAME",
    "TRANSFORM_TYPE",
    "mark_quantization_config",
    "read_quantization_config",
]

TRANSFORM_TYPE = "cat"
"""Name of the transform in compressed-tensors' registry"""

TRANSFORM_NAME = "cat_input"
"""Name of the submodule of a Linear which holds the transform of its group"""

TENSOR_SUFFIX = f".{TRANSFORM_NAME}.weight"
"""What the name of every transform tensor of a checkpoint ends in"""

_FORMAT_PREFIX = "cat-modifier/"
_REQUIRES = "cat-modifier"


class CATScheme(TransformScheme):
    """
    All groups of Linears with a transform of one block size, Hadamard matrix and clipping.

    :param type: always ``cat``
    :param apply: one entry a group; its targets are the names of the group's Linears, of
        which the first holds the tensor ``<name>.cat_input.weight``
    :param head_dim: k, block size; the tensor has shape (d/k, k, k). None if there are no
        blocks, nor a tensor, but the Hadamard matrix alone
    :param hadamard_size: p, order of the Hadamard matrix that multiplies channels after the
        blocks; 1 if there is none
    :param hadamard_stride: q, distance of the channels which it multiplies: those of each
        span of p * q channels
    :param clip_ratio: of the range to which each token is clipped after all that, to the
        range of its values and zero
    :param precision: dtype of the stored tensors
    """

    type: Literal["cat"] = TRANSFORM_TYPE
    head_dim: int | None = Field(default=None, gt=0)
    hadamard_size: int = Field(default=1, gt=0)
    hadamard_stride: int = Field(default=1, gt=0)
    clip_ratio: float = Field(default=1.0, gt=0, le=1)
    precision: TorchDtype = Field(default=torch.bfloat16)

    @property
    def hadamard_span(self) -> int:
        """Neighbouring channels that the Hadamard matrix mixes; 1 if there is none"""
        return self.hadamard_size * self.hadamard_stride if self.hadamard_size > 1 else 1

    @model_validator(mode="after")
    def _validate_apply(self) -> "CATScheme":
        if not is_hadamard_order(self.hadamard_size):
            raise ValueError(f"{self.hadamard_size} is no known order of a Hadamard matrix")
        if self.head_dim is None and self.hadamard_size == 1 and self.clip_ratio == 1:
            raise ValueError("A scheme has blocks, or a Hadamard matrix, or clips")
        if self.head_dim is not None and self.head_dim % self.hadamard_stride:
            raise ValueError(
                f"Blocks of {self.head_dim} do not hold the inner Hadamard matrix, of order "
                f"{self.hadamard_stride}"
            )
        for args in self.apply:
            if args.location != TransformLocation.INPUT or args.inverse or args.ignore:
                raise ValueError("CAT transforms apply to inputs, without exceptions")
            if not args.targets or any(":" in target for target in args.targets):
                raise ValueError("CAT transforms target Linears by their full names")
        return self


class CATTransformConfig(TransformConfig):
    """
    Online transforms of a model.

    :param config_groups: schemes by an arbitrary name
    :param requires: always ``cat-modifier``, for people who read the error of a reader
        that does not know it
    :param folded: Linears whose input has a transform in the rows of another Linear, by name;
        and the names of those. For those who look at single Linears
    :param version: of this layout
    """

    config_groups: dict[str, CATScheme]
    folded: dict[str, str] = Field(default_factory=dict)
    requires: Literal["cat-modifier"] = _REQUIRES
    version: Literal[2] = 2

    @model_validator(mode="after")
    def _validate_targets(self) -> "CATTransformConfig":
        names = [name for _, args in self.groups() for name in args.targets]
        if len(names) != len(set(names)):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{repeated} is targeted by more than one transform")
        return self

    def groups(self) -> list[tuple[CATScheme, TransformArgs]]:
        """All groups of Linears, each with the scheme of its transform"""
        return [
            (scheme, args) for scheme in self.config_groups.values() for args in scheme.apply
        ]

    def add_group(
        self,
        names: list[str],
        block_size: int | None,
        hadamard_size: int,
        hadamard_stride: int,
        clip_ratio: float,
        precision: torch.dtype,
    ) -> tuple[CATScheme, TransformArgs]:
        """
        :param names: of the Linears of the group, the one which holds the tensor first
        :param block_size: see ``head_dim`` of :class:`CATScheme`, as the others
        :return: the scheme of the group, and its entry in it
        """
        key = f"cat_{block_size or 0}_{hadamard_size}_{hadamard_stride}_{clip_ratio}"
        if key not in self.config_groups:
            self.config_groups[key] = CATScheme(
                head_dim=block_size,
                hadamard_size=hadamard_size,
                hadamard_stride=hadamard_stride,
                clip_ratio=clip_ratio,
                precision=precision,
            )
        scheme = self.config_groups[key]
        args = TransformArgs(targets=list(names), location=TransformLocation.INPUT)
        scheme.apply.append(args)
        return scheme, args


def mark_quantization_config(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """
    Mark a quantization config which holds a :class:`CATTransformConfig`, so that readers
    which do not know this package refuse it.

    :param quantization_config: as in ``config.json``
    :return: a marked copy; the config itself, if it holds no CAT transforms
    """
    if not _has_transform(quantization_config):
        return quantization_config
    marked = deepcopy(quantization_config)
    for group in marked["config_groups"].values():
        group_format = group.get("format") or marked["format"]
        if not group_format.startswith(_FORMAT_PREFIX):
            group["format"] = _FORMAT_PREFIX + group_format
    return marked


def read_quantization_config(
    quantization_config: dict[str, Any] | None,
) -> tuple[dict[str, Any], CATTransformConfig] | None:
    """
    Take the CAT part out of a quantization config.

    :param quantization_config: as in ``config.json``
    :return: a stock compressed-tensors config, and the transforms; None if the config is
        not of a CAT checkpoint
    :raises ValueError: if the config is of a CAT checkpoint, but is damaged or made by a
        later version
    """
    config = quantization_config or {}
    # configs of other methods can have entries of these names and of any type
    config_groups = config.get("config_groups")
    groups = config_groups.values() if isinstance(config_groups, dict) else []
    is_marked = [
        isinstance(group, dict) and str(group.get("format")).startswith(_FORMAT_PREFIX)
        for group in groups
    ]
    if not (_has_transform(config) or any(is_marked)):
        return None
    if not (_has_transform(config) and is_marked and all(is_marked)):
        raise ValueError(
            "The quantization_config of this checkpoint is damaged: `transform_config` and "
            f"the `{_FORMAT_PREFIX}` formats of `config_groups` must come together"
        )

    stock = deepcopy(config)
    transform_config = stock.pop("transform_config")
    for group in stock["config_groups"].values():
        group["format"] = group["format"].removeprefix(_FORMAT_PREFIX)
    try:
        return stock, CATTransformConfig.model_validate(transform_config)
    except ValidationError as error:
        raise ValueError(
            "The transform_config of this checkpoint cannot be read by this version of "
            f"cat-modifier: {error}"
        ) from error


def _has_transform(quantization_config: dict[str, Any]) -> bool:
    transform_config = quantization_config.get("transform_config")
    return isinstance(transform_config, dict) and transform_config.get("requires") == _REQUIRES
