# SPDX-License-Identifier: Apache-2.0
"""
The online transforms of a checkpoint in ``config.json``, version 1 of the format.

A CAT checkpoint is a compressed-tensors checkpoint. Its ``quantization_config`` differs in
three places:

- ``weights`` of every config group has a field that tells what to install. Stock readers
  refuse it first, and show its text in their errors.
- ``transform_config`` is a :class:`CATTransformConfig`. A stock reader of transforms refuses
  its unknown fields.
- ``format`` of every config group has a prefix. A reader that ignores ``transform_config``
  refuses the unknown format.

All errors name this package: weights that expect transformed inputs must never run without
the transform. ``cat_modifier/README.md`` specifies the format.
"""

from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
from compressed_tensors.transform import (
    TransformArgs,
    TransformConfig,
    TransformLocation,
    TransformScheme,
)
from compressed_tensors.utils import TorchDtype
from packaging.requirements import InvalidRequirement, Requirement
from pydantic import (
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from cat_modifier.checkpoint.digest import changed_fields, config_digests
from cat_modifier.checkpoint.marker import METHOD_NAME, has_transform
from cat_modifier.functional.hadamard import is_hadamard_order
from cat_modifier.functional.layout import TransformLayout
from cat_modifier.version import __version__

__all__ = [
    "CATInput",
    "CATScheme",
    "CATTransformConfig",
    "TENSOR_SUFFIX",
    "TRANSFORM_NAME",
    "mark_quantization_config",
    "read_quantization_config",
]

TRANSFORM_NAME = "cat_input"
"""Name of the submodule of a Linear that holds the transform of its input"""

TENSOR_SUFFIX = f".{TRANSFORM_NAME}.weight"
"""End of the name of every transform tensor of a checkpoint"""

_FORMAT_PREFIX = "cat-modifier/"
_TYPE = "cat"
_VERSION = 1
_REQUIRES = "cat-modifier>=0.1.0"
"""Oldest release that reads version 1"""
_ADVICE_FIELD = "requires"
_ADVICE = "pip install cat-modifier and import cat_modifier"
"""For readers of errors of stock libraries. pydantic shows 48 characters of a string"""

_PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}

# strict: JSON's `true` and "16" are not sizes
_Size = Annotated[int, Strict(), Field(gt=0)]


class CATInput(TransformArgs):
    """
    One transformed input.

    :param targets: full names of the Linears that read the input; the first holds the tensor
        ``<name>.cat_input.weight``
    :param location: always ``input``
    :param sha256: digest of the tensor's elements, see
        :func:`cat_modifier.checkpoint.digest.tensor_digest`. None without blocks, and before
        the checkpoint is saved
    """

    sha256: Annotated[str, Strict(), Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class CATScheme(TransformScheme):
    """
    The inputs whose transforms have the same sizes and clipping.

    :param type: always ``cat``
    :param apply: one entry per input
    :param block_size: k; the tensor has shape (d/k, k, k). None for no blocks and no tensor
    :param online_hadamard_size: p, order of the Hadamard matrix after the blocks; 1 for none
    :param interleave: q, distance of the channels that the Hadamard matrix multiplies, in
        each span of p * q channels; 1 if p is 1
    :param clip_ratio: clipped range of each transformed token, relative to the range of its
        values and zero; 1 does not clip
    :param precision: dtype of the stored tensors: bfloat16, float16, float32, or int8 in
        steps of 1/1024
    """

    type: Literal["cat"]
    apply: list[CATInput]
    block_size: _Size | None
    online_hadamard_size: _Size
    interleave: _Size
    clip_ratio: Annotated[float, Strict(), Field(gt=0, le=1)]
    precision: TorchDtype

    @property
    def hadamard_size(self) -> int:
        """p * q, neighbouring channels that the Hadamard matrix mixes; 1 for none"""
        return self.online_hadamard_size * self.interleave

    @field_validator("precision", mode="before")
    @classmethod
    def _check_precision(cls, value: Any) -> torch.dtype:
        precision = _PRECISIONS.get(value) if isinstance(value, str) else value
        if not isinstance(precision, torch.dtype) or precision not in _PRECISIONS.values():
            raise ValueError(
                f"`precision` must be one of {', '.join(_PRECISIONS)}, not {value!r}"
            )
        return precision

    @model_validator(mode="after")
    def _check(self) -> "CATScheme":
        if self.head_dim is not None or self.randomize or self.requires_grad:
            raise ValueError("`head_dim`, `randomize` and `requires_grad` have no meaning here")
        if not is_hadamard_order(self.online_hadamard_size):
            raise ValueError(
                f"{self.online_hadamard_size} is no known order of a Hadamard matrix"
            )
        if self.online_hadamard_size == 1 and self.interleave != 1:
            raise ValueError("`interleave` must be 1 without a Hadamard matrix")
        if self.block_size is None and self.online_hadamard_size == 1 and self.clip_ratio == 1:
            raise ValueError("A scheme has blocks, or a Hadamard matrix, or clips")
        if self.block_size is not None and self.block_size % self.interleave:
            raise ValueError(
                f"Blocks of {self.block_size} do not hold the fused Hadamard matrix of order "
                f"{self.interleave}"
            )
        for args in self.apply:
            if args.location != TransformLocation.INPUT or args.inverse or args.ignore:
                raise ValueError("CAT transforms apply to inputs, without exceptions")
            if not args.targets or any(":" in target for target in args.targets):
                raise ValueError("CAT transforms target Linears by their full names")
            if args.sha256 is not None and self.block_size is None:
                raise ValueError("`sha256` has no meaning without blocks")
        return self

    @model_serializer
    def _write(self) -> dict[str, Any]:
        # only the fields of version 1: compressed-tensors may add fields to its schemes
        return {
            "type": self.type,
            "apply": [_write_input(args) for args in self.apply],
            "block_size": self.block_size,
            "online_hadamard_size": self.online_hadamard_size,
            "interleave": self.interleave,
            "clip_ratio": self.clip_ratio,
            "precision": str(self.precision).removeprefix("torch."),
        }


def _write_input(args: CATInput) -> dict[str, Any]:
    entry = {"targets": list(args.targets), "location": TransformLocation.INPUT.value}
    return entry if args.sha256 is None else entry | {"sha256": args.sha256}


class CATTransformConfig(TransformConfig):
    """
    The online transforms of a model.

    :param config_groups: schemes by an arbitrary name
    :param fused: transforms fused into rows: the name of the Linear with the transformed
        input, and the name of the Linear with the rows. Only tools that look at single
        Linears need it
    :param requires: requirement of the oldest release that can read the checkpoint, in
        pip's syntax. Stock readers show it in their error
    :param version: version of the format
    """

    config_groups: dict[str, CATScheme]
    fused: dict[str, str]
    requires: str
    version: int

    @classmethod
    def empty(cls) -> "CATTransformConfig":
        """Make a config without transforms"""
        return cls(config_groups={}, fused={}, requires=_REQUIRES, version=_VERSION)

    @field_validator("requires")
    @classmethod
    def _check_requires(cls, value: str) -> str:
        try:
            requirement = Requirement(value)
        except InvalidRequirement as error:
            raise ValueError(
                f"`requires` is not a requirement in pip's syntax: {value!r}"
            ) from error
        if requirement.name != METHOD_NAME or requirement.url is not None:
            raise ValueError(f"`requires` must name a release of {METHOD_NAME}, not {value!r}")
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise ValueError(
                f"this is cat-modifier {__version__}, and the checkpoint needs {value}: "
                f"pip install '{value}'"
            )
        return value

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, value: Any) -> int:
        if type(value) is not int or value != _VERSION:
            raise ValueError(
                f"cat-modifier {__version__} reads version {_VERSION} of the format, "
                f"not {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _check_targets(self) -> "CATTransformConfig":
        names = [name for _, args in self.inputs() for name in args.targets]
        if len(names) != len(set(names)):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{repeated} is targeted by more than one transform")
        return self

    def inputs(self) -> list[tuple[CATScheme, CATInput]]:
        """List all transformed inputs, each as its scheme and its entry in the scheme"""
        return [
            (scheme, args) for scheme in self.config_groups.values() for args in scheme.apply
        ]

    def add_input(
        self,
        names: list[str],
        layout: TransformLayout,
        clip_ratio: float,
        precision: torch.dtype | None,
    ) -> tuple[CATScheme, CATInput]:
        """
        Add the transform of an input.

        :param names: Linears that read the input; the first holds the tensor
        :param layout: sizes of the transform
        :param clip_ratio: see :class:`CATScheme`
        :param precision: dtype of the stored blocks; None if no blocks are applied online
        :return: scheme of the input, and entry of the input in the scheme
        """
        block_size = None if precision is None else layout.stored_size
        precision = precision or torch.bfloat16  # which the format wants in any case
        sizes = (block_size or 0, layout.online_hadamard_size, layout.interleave)
        dtype = str(precision).removeprefix("torch.")
        key = "_".join(map(str, (_TYPE, *sizes, clip_ratio, dtype)))
        if key not in self.config_groups:
            self.config_groups[key] = CATScheme(
                type=_TYPE,
                apply=[],
                block_size=block_size,
                online_hadamard_size=layout.online_hadamard_size,
                interleave=layout.interleave,
                clip_ratio=clip_ratio,
                precision=precision,
            )
        scheme = self.config_groups[key]
        args = CATInput(targets=list(names), location=TransformLocation.INPUT)
        scheme.apply.append(args)
        return scheme, args


def mark_quantization_config(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """
    Mark a quantization config that holds CAT transforms, and write the digests of its fields.
    Readers that do not know this package then refuse it.

    :param quantization_config: ``quantization_config`` of ``config.json``
    :return: a marked copy; the config itself if it holds no CAT transforms
    """
    if not has_transform(quantization_config):
        return quantization_config
    marked = deepcopy(quantization_config)
    for group in marked["config_groups"].values():
        group_format = group.get("format") or marked["format"]
        if not group_format.startswith(_FORMAT_PREFIX):
            group["format"] = _FORMAT_PREFIX + group_format
        if group.get("weights"):
            group["weights"][_ADVICE_FIELD] = _ADVICE
    marked["transform_config"]["sha256"] = config_digests(marked)
    return marked


def read_quantization_config(
    quantization_config: dict[str, Any] | None,
) -> tuple[dict[str, Any], CATTransformConfig] | None:
    """
    Split a quantization config into the stock part and the CAT part.

    :param quantization_config: ``quantization_config`` of ``config.json``
    :return: a stock compressed-tensors config, and the transforms; None if the checkpoint
        is not a CAT checkpoint
    :raises ValueError: if the config is damaged, or needs a later release
    """
    config = quantization_config or {}
    # configs of other methods can have entries of the same names, but of any type
    config_groups = config.get("config_groups")
    groups = config_groups.values() if isinstance(config_groups, dict) else []
    is_marked = [
        isinstance(group, dict) and str(group.get("format")).startswith(_FORMAT_PREFIX)
        for group in groups
    ]
    if not (has_transform(config) or any(is_marked)):
        return None
    if not (has_transform(config) and is_marked and all(is_marked)):
        raise ValueError(
            "The quantization_config of this checkpoint is damaged: `transform_config` and "
            f"the `{_FORMAT_PREFIX}` formats of `config_groups` must come together"
        )

    stock = deepcopy(config)
    transform_config = stock.pop("transform_config")
    digests = transform_config.pop("sha256", "missing")
    for group in stock["config_groups"].values():
        group["format"] = group["format"].removeprefix(_FORMAT_PREFIX)
        if isinstance(group.get("weights"), dict):
            group["weights"].pop(_ADVICE_FIELD, None)
    try:
        transforms = CATTransformConfig.model_validate(transform_config)
    except ValidationError as error:
        raise ValueError(
            f"The transform_config of this checkpoint cannot be read by cat-modifier "
            f"{__version__}: {error}"
        ) from error
    _check_digests(config, transforms, digests)
    return stock, transforms


def _check_digests(config: dict[str, Any], transforms: CATTransformConfig, digests: Any):
    """
    :param config: quantization config with all fields
    :param digests: digests of the fields
    :raises ValueError: if a digest is missing, or a field is not the one that was saved
    """
    for scheme, args in transforms.inputs():
        if scheme.block_size is not None and args.sha256 is None:
            raise ValueError(
                "The transform_config of this checkpoint is damaged: it has no `sha256` for "
                f"the transform of {args.targets[0]}"
            )
    if digests is None:
        return
    if not isinstance(digests, dict):
        raise ValueError(
            "The transform_config of this checkpoint is damaged: it has no `sha256` of the "
            "fields of the quantization_config"
        )
    if fields := changed_fields(config, digests):
        raise ValueError(
            f"`{'`, `'.join(fields)}` in the quantization_config of config.json is not what "
            "was saved, by its SHA-256: the file is damaged, or belongs to another checkpoint. "
            "Copy or download it again. If you changed it and know that the weights suit it, "
            "set `sha256` of `transform_config` to null"
        )
