# SPDX-License-Identifier: Apache-2.0
"""Which transform belongs to which Linear of the model that vLLM builds."""

from collections.abc import Callable
from typing import Any

import torch

from cat_modifier.checkpoint.names import layer_of
from cat_modifier.checkpoint.schema import (
    TENSOR_SUFFIX,
    TRANSFORM_NAME,
    CATScheme,
    CATTransformConfig,
)
from cat_modifier.integrations.vllm.compat import get_pp_group
from cat_modifier.integrations.vllm.input_transform import InputTransform

__all__ = ["TransformRegistry", "TransformedInput"]

_EXPERTS = ".experts"


class TransformedInput:
    """
    A transformed input, and the module of its transform once vLLM has made it.

    :param scheme: sizes and clipping of the transform
    :param names: Linears that read the input, as the checkpoint names them; it stores the
        tensor under the first
    :param sha256: digest of the tensor; None without blocks

    Attributes:
        names: names of vLLM, with the names of the checkpoint
    """

    def __init__(self, scheme: CATScheme, names: list[str], sha256: str | None):
        self.scheme, self._sha256 = scheme, sha256
        self.names = {name: name for name in names}
        self._tensor = names[0] + TENSOR_SUFFIX  # as the checkpoint names it
        self._module: InputTransform | None = None

    @property
    def first(self) -> str:
        return next(iter(self.names))

    def rename(self, map_name: Callable[[str], str | None]):
        """
        Rename Linears.

        :param map_name: function from an old name to a new one; None to leave the Linear out
        """
        mapped = {map_name(old): original for old, original in self.names.items()}
        self.names = {new: original for new, original in mapped.items() if new is not None}

    @property
    def module(self) -> InputTransform:
        """The transform, once the layer of the first Linear is made"""
        if self._module is None:
            raise RuntimeError(f"{self.first}, which holds the transform, was not made yet")
        return self._module

    def add_to(
        self,
        layer: Any,
        input_size: int,
        shard_size: int,
        dtype: torch.dtype,
        keeps_int8: bool = True,
    ):
        """
        Make the module and add it to the layer that loads its tensor.

        :param input_size: d, size of the whole input
        :param shard_size: size of the input on this rank
        :param dtype: dtype of the input
        :param keeps_int8: see :class:`InputTransform`
        """
        rank = layer.tp_rank if shard_size != input_size else 0
        layer.register_module(
            TRANSFORM_NAME,
            self.make_module(input_size, shard_size, rank, dtype, keeps_int8),
        )

    def make_module(
        self,
        input_size: int,
        shard_size: int,
        shard_rank: int,
        dtype: torch.dtype,
        keeps_int8: bool = True,
    ) -> InputTransform:
        """
        Make the module. All layers that read the input use it from then on.

        :param shard_rank: index of this rank
        """
        self._module = InputTransform(
            self._tensor,
            self.scheme,
            input_size,
            shard_size,
            shard_rank,
            dtype,
            self._sha256,
            keeps_int8,
        )
        return self._module


class TransformRegistry:
    """
    Transformed inputs by the names of the Linears that read them.

    :param transforms: transforms of the checkpoint, with the names of Transformers

    Attributes:
        fused: Linears on either side of a transform that is fused into weights
    """

    def __init__(self, transforms: CATTransformConfig):
        self._inputs = [
            TransformedInput(scheme, list(args.targets), args.sha256)
            for scheme, args in transforms.inputs()
        ]
        self.fused = {*transforms.fused, *transforms.fused.values()}
        self._claimed: set[str] = set()
        self._adopted: set[str] = set()
        self._index_names()

    def _index_names(self):
        """Mixtures have tens of thousands of Linears, each of which is looked up"""
        self._input_of = {name: one for one in self._inputs for name in one.names}

    def map_names(self, map_name: Callable[[str], str | None]):
        """
        Rename Linears. vLLM asks for it again for nested models, whose layers it may have
        made already: names of Linears that are part of a layer stay.

        :param map_name: function from an old name to a new one; None for a part that vLLM
            leaves out
        """

        def rename(name: str) -> str | None:
            return name if name in self._claimed else map_name(name)

        for one in self._inputs:
            one.rename(rename)
        self.fused = {new for old in self.fused if (new := rename(old)) is not None}
        self._inputs = [one for one in self._inputs if one.names]
        self._index_names()

    def find(self, parts: list[str]) -> TransformedInput | None:
        """
        Find the transform of a layer's input.

        :param parts: Linears that vLLM merges into the layer
        :raises ValueError: if they do not share one transform
        """
        found = [self._input_of.get(name) for name in parts]
        if any(one is not found[0] for one in found):
            raise ValueError(
                f"vLLM merges {', '.join(parts)} into one layer, but they do not share one "
                "transform in this checkpoint: group them by `mappings` of CATModifier"
            )
        return found[0]

    def find_siblings(self, parent: str, count: int) -> list[str]:
        """
        List the Linears of one module that a merged layer of it consists of.

        :param parent: name of the module
        :param count: number of Linears that are merged
        :return: those of the module that share a transform, if they are as many, and no
            others are; else nothing
        """
        siblings = [
            [name for name in one.names if name.rpartition(".")[0] == parent]
            for one in self._inputs
        ]
        found = [names for names in siblings if len(names) == count]
        return found[0] if len(found) == 1 else []

    def adopt(self, prefix: str, parts: list[str]) -> list[str]:
        """
        Find the Linears of a layer that vLLM names otherwise than by its path, as
        `attention.output` for BERT's `attention.self`.

        :param prefix: name of the layer
        :param parts: Linears that vLLM merges into it, by vLLM's name of their module
        :return: the Linears of the same names in the same decoder layer that share a transform
            with no other, if there is one such transform; else nothing
        """
        layer = layer_of(prefix)
        if not layer:
            return []
        ends = sorted(part.rpartition(".")[2] for part in parts)
        found = [
            list(one.names)
            for one in self._inputs
            if sorted(name.rpartition(".")[2] for name in one.names) == ends
            and all(name.startswith(f"{layer}.") for name in one.names)
        ]
        if len(found) != 1 or self._claimed.intersection(found[0]):
            return []
        self._adopted.update(found[0])
        return found[0]

    def adopt_experts(self, prefix: str):
        """
        Rename the experts of a decoder layer, where vLLM calls the module that holds them
        otherwise than Transformers does (Mixtral's `block_sparse_moe` is its `mlp`).

        :param prefix: name of the experts' layer; its decoder layer has no others
        """
        layer = layer_of(prefix)
        if not layer or not prefix.endswith(_EXPERTS) or self.has_below(prefix):
            return
        names = [x for one in self._inputs for x in one.names if x.startswith(f"{layer}.")]
        holders = {x.partition(f"{_EXPERTS}.")[0] for x in names if f"{_EXPERTS}." in x}
        if len(holders) == 1:
            old, new = holders.pop() + _EXPERTS, prefix
            for one in self._inputs:
                one.rename(
                    lambda x: new + x.removeprefix(old) if x.startswith(f"{old}.") else x
                )
            self._index_names()

    def has_below(self, prefix: str) -> bool:
        """Whether a Linear inside a module has a transformed input"""
        return any(name.startswith(f"{prefix}.") for one in self._inputs for name in one.names)

    def claim(self, parts: list[str]):
        """
        Note that Linears are part of a layer that applies their transform.

        :raises NotImplementedError: if another layer was taken for theirs
        """
        if twice := self._adopted & self._claimed & set(parts):
            raise NotImplementedError(
                f"{min(twice)} has an input transform, but vLLM has two layers that may be "
                "this one: add it to `ignore` of CATModifier"
            )
        self._claimed.update(parts)

    def check_claimed(self):
        """
        Check, after all layers are made, that no Linear was made without its transform.

        :raises NotImplementedError: if one was
        """
        for one in self._inputs:
            forgotten = [name for name in one.names if name not in self._claimed]
            # with pipeline parallelism another rank has the other inputs
            is_elsewhere = len(forgotten) == len(one.names) and get_pp_group().world_size > 1
            if forgotten and not is_elsewhere:
                raise NotImplementedError(
                    f"{one.names[forgotten[0]]} has an input transform, but vLLM has no layer "
                    "to apply it in: the layer cannot be quantized, has another name there, or "
                    "config.json has fewer layers. Add it to `ignore` of CATModifier and of "
                    "the quantization modifier"
                )
