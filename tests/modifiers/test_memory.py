# SPDX-License-Identifier: Apache-2.0
"""One Linear in float64 is the peak of memory, however many Linears and inputs there are"""

import weakref
from collections.abc import Mapping

import pytest
import torch
from plain_inputs import OPTIONS, make_input, make_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.modifiers.cat.apply import LinearWeights, apply_transforms
from cat_modifier.modifiers.cat.plan import plan_transforms
from cat_modifier.modifiers.cat.plan_options import PlanOptions

SIZE = 256
LINEAR = SIZE * SIZE * 8
"""Bytes of a Linear in float64"""


class Float64Counter(TorchDispatchMode):
    """Counts the bytes of float64 storages that are alive"""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, size: int):
        self.alive.discard(key)
        self.bytes -= size


class WeightCopies(Mapping):
    """Weights that are copied to float64 at each access"""

    def __init__(self, weights):
        self.weights = weights

    def __getitem__(self, name):
        return self.weights[name].double()

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def make_inputs(names, is_shared):
    """One input of all Linears, or an input for each; blocks of a quarter of the input"""
    groups = [names] if is_shared else [[name] for name in names]
    return [make_input(one, SIZE, SIZE // 4) for one in groups]


@pytest.mark.parametrize("is_shared", [True, False], ids=["one input", "an input each"])
@pytest.mark.parametrize("max_overhead", [None, 10.0])
def test_planning(is_shared, max_overhead):
    """The gates of all experts share an input; their down_proj have one each"""
    peaks = {}
    options = PlanOptions(**OPTIONS | {"max_overhead": max_overhead})
    for count in (1, 16):
        names = [f"expert{i}" for i in range(count)]
        weights = WeightCopies(make_weights(names, SIZE, SIZE))
        inputs = make_inputs(names, is_shared)
        with Float64Counter() as counter:
            plan_transforms(inputs, weights, options, "a layer")
        peaks[count] = counter.peak
    # the Linear, its transformed copy, and what is computed on the way
    assert LINEAR < peaks[1] < 6 * LINEAR
    assert peaks[16] < 1.1 * peaks[1]


@pytest.mark.parametrize("is_shared", [True, False], ids=["one input", "an input each"])
def test_applying(is_shared):
    peaks = {}
    options = PlanOptions(**OPTIONS)
    for count in (1, 16):
        linears = {f"expert{i}": torch.nn.Linear(SIZE, SIZE, bias=False) for i in range(count)}
        inputs = make_inputs(list(linears), is_shared)
        transforms = plan_transforms(inputs, LinearWeights(linears), options).transforms
        before = linears["expert0"].weight.detach().clone()
        with Float64Counter() as counter:
            apply_transforms(transforms, linears, CATTransformConfig.empty())
        peaks[count] = counter.peak
        assert not torch.allclose(linears["expert0"].weight, before)
    assert LINEAR < peaks[1] < 4 * LINEAR
    assert peaks[16] < 1.1 * peaks[1]
