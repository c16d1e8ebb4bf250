# SPDX-License-Identifier: Apache-2.0
"""The inputs of the experts of a layer: loading their transforms, and applying them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.checkpoint.schema import TRANSFORM_NAME
from cat_modifier.checkpoint.transform_module import absent
from cat_modifier.integrations.vllm.input_transform import InputTransform, add_loader
from cat_modifier.integrations.vllm.registry import TransformedInput
from cat_modifier.kernels.ops import quantize, warm_up

__all__ = ["ExpertInputs"]


class ExpertInputs(Module):
    """
    Inputs of the gates, or of the down projections, of all experts of a layer on this rank.

    All experts may read one input, each its own, and inputs may have no transform.

    vLLM loads the tensors of all experts into one parameter of the layer. Transforms of
    different sizes fit into it one below the other, each in a row that the largest fills.

    :param sources: transformed input of each expert of the model's layer; None for an input
        without a transform
    :param local: indices of the experts on this rank, in their order there
    :param prefix: name of the layer; it loads the transforms that are stored below it
    :param projections: names of the experts' projections in the checkpoint, by the names
        ``w1``, ``w2`` and ``w3`` that vLLM gives them
    :param input_size: d, size of a whole input
    :param shard_size: size of an input on this rank
    :param shard_rank: index of this rank
    :param dtype: dtype of the inputs
    :raises ValueError: if transforms have several dtypes, int8 apart, or do not fit on a rank

    Attributes:
        weight: parameter, shape (transforms, numbers of the largest); None without blocks
    """

    weight: Parameter | None

    def __init__(
        self,
        sources: list[TransformedInput | None],
        local: list[int],
        prefix: str,
        projections: dict[str, str],
        input_size: int,
        shard_size: int,
        shard_rank: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._sources = [sources[expert] for expert in local]
        self._prefix, self._projections = prefix, projections
        self._shard_size, self._dtype = shard_size, dtype
        # not registered as modules: their tensors are rows of one parameter
        self._transforms: list[InputTransform] = []
        self._row_of: dict[str, int | None] = {}
        for one in sources:
            if one is None or one.first in self._row_of or not _is_below(prefix, one.first):
                continue
            # Linears of other layers, as of shared experts, may read the input too
            is_used = one in self._sources or not all(_is_below(prefix, x) for x in one.names)
            self._row_of[one.first] = len(self._transforms) if is_used else None
            if is_used:
                self._transforms.append(
                    one.make_module(input_size, shard_size, shard_rank, dtype)
                )
        self.weight = None
        with_blocks = [one for one in self._transforms if one.weight is not None]
        blocks = [one.weight for one in with_blocks if one.weight is not None]
        if not blocks:
            return
        if len({one.dtype for one in with_blocks}) > 1:
            raise ValueError(
                f"{prefix}: transforms of its experts have several `precision`s, which cannot "
                "be served: make the checkpoint again with one"
            )
        # the dtype of the computation holds int8, too
        stored = {one.dtype for one in blocks}
        dtype = stored.pop() if len(stored) == 1 else with_blocks[0].dtype
        rows = blocks[0].new_full(
            (len(self._transforms), max(one.numel() for one in blocks)),
            absent(dtype),
            dtype=dtype,
        )
        self.weight = Parameter(rows, requires_grad=False)
        add_loader(self.weight, self.load)
        for row, transform in zip(rows, self._transforms, strict=True):
            if transform.weight is not None:
                transform.weight.data = _blocks_in(row, transform)

    @property
    def is_shared(self) -> bool:
        """Whether all experts read one input"""
        return all(one is self._sources[0] for one in self._sources)

    def add_to(self, layer: Module, name: str):
        """
        Add the module to the layer whose experts read the inputs.

        :param name: start of the names of the experts' parameters, as ``w13_``
        """
        name += TRANSFORM_NAME
        layer.register_module(name, self)
        if self.weight is not None:
            # some models load by the layer's attributes, which are no dotted names
            setattr(layer, f"{name}.weight", _DottedParameter(self))

    # arguments have the names by which vLLM passes them
    def load(
        self,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """
        Load a transform, as vLLM's weight loader of experts.

        :raises ValueError: if the tensor does not fit, or the checkpoint must not hold it
        """
        name = f"{self._prefix}.{expert_id}.{self._projections[shard_id]}"
        if name not in self._row_of:
            raise ValueError(
                f"The checkpoint stores a transform tensor under {name}, which its "
                "transform_config does not ask for: the checkpoint is damaged"
            )
        row = self._row_of[name]
        if row is not None:
            transform = self._transforms[row]
            transform.load(_blocks_in(param.data[row], transform), loaded_weight)
        return row is not None if return_success else None

    def check_loaded(self):
        """
        :raises ValueError: if the checkpoint did not hold a tensor
        """
        # on the meta device until its turn in a weight reload, which keeps what is missing
        if self.weight is not None and self.weight.is_meta:
            return
        for transform in self._transforms:
            transform.check_loaded()

    def warm_up(self, num_bits: int, symmetric: bool):
        """Compile the kernels before requests wait for them"""
        inputs = torch.empty((0, self._shard_size), dtype=self._dtype)
        for one in self._sources:
            warm_up(inputs, num_bits, symmetric, None if one is None else one.module)

    def quantize(
        self, expert: int, x: Tensor, num_bits: int, symmetric: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Transform, then quantize the input of an expert.

        :param expert: index among the experts on this rank
        :param x: shape (tokens, d on this rank), floating point
        :return: see :func:`cat_modifier.kernels.ops.quantize`
        """
        source = self._sources[expert]
        quantizer = quantize if source is None else source.module.quantize
        return quantizer(x, num_bits, symmetric)


class _DottedParameter:
    """Stands for a parameter of a submodule where vLLM asks a layer for it by one name"""

    def __init__(self, module: ExpertInputs):
        self._module = module

    def weight_loader(self, param: Any, *args, **kwargs) -> bool | None:
        # a weight reload exchanges the parameter
        weight: Any = self._module.weight
        return weight.weight_loader(weight, *args, **kwargs)


def _is_below(prefix: str, name: str) -> bool:
    return name.startswith(f"{prefix}.")


def _blocks_in(row: Tensor, transform: InputTransform) -> Tensor:
    """Find the blocks of a transform in its row of the parameter"""
    assert transform.weight is not None
    shape = transform.weight.shape
    return row[: shape.numel()].view(shape)
