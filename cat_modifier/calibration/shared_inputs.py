# SPDX-License-Identifier: Apache-2.0
"""
Linears that read the same input, found by observing the forward pass.

A transform belongs to an input, not to a Linear. q, k and v read one tensor and share its
transform. So do gate and up, or the gates of all experts of a mixture.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Linear

__all__ = ["SharedInput", "SharedInputObserver"]


@dataclass
class SharedInput:
    """
    An input and the Linears that read it.

    :param linears: Linears by full name, in the order of the model
    :param is_closed: whether further Linears are kept out, even if they read the same tensor
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    is_closed: bool = False

    @property
    def first(self) -> str:
        """Name of the first Linear, under which the transform is stored"""
        return next(iter(self.linears))

    @property
    def in_features(self) -> int:
        """d, size of the input"""
        return self.linears[self.first].in_features


class SharedInputObserver:
    """
    Finds shared inputs as Linears are called.

    Two Linears share an input if they are called with the same tensor: the same memory, shape
    and strides, not written to in between, and still alive.

    :param linears: Linears by full name, in the order of the model
    :ivar called: full names of the Linears that were called
    """

    def __init__(self, linears: Mapping[str, Linear]):
        self.called: set[str] = set()
        self._position = {name: index for index, name in enumerate(linears)}
        self._linears = linears
        self._input_of: dict[str, SharedInput] = {}
        self._seen: dict[tuple, tuple[weakref.ref, list[SharedInput]]] = {}

    @property
    def inputs(self) -> list[SharedInput]:
        """List all inputs, in the order of the model"""
        unique = {id(one): one for one in self._input_of.values()}
        return sorted(unique.values(), key=lambda one: self._position[one.first])

    def observe(self, name: str, x: Tensor) -> tuple[SharedInput, bool]:
        """
        Record the call of a Linear.

        :param name: full name of the Linear
        :param x: input of the call
        :return: the shared input, and whether ``x`` is new to it: True for the first Linear
            called with ``x``, False for the others
        """
        self.called.add(name)
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        reference, read_by = self._seen.get(key, (None, []))
        if reference is None or reference() is None:
            self._forget_dead()
            read_by = []
            self._seen[key] = (weakref.ref(x), read_by)
        if name not in self._input_of:
            is_open = (one for one in read_by if not one.is_closed)
            self._add(next(is_open, None) or SharedInput(), name)
        # Linears of different inputs may later be called with one tensor by chance: count it
        # for each input
        shared = self._input_of[name]
        is_new = all(one is not shared for one in read_by)
        if is_new:
            read_by.append(shared)
        return shared, is_new

    def set_inputs(self, inputs: Iterable[Iterable[str]]):
        """
        Declare shared inputs in advance. No further Linear joins them.

        :param inputs: names of the Linears of each input
        """
        for names in inputs:
            shared = SharedInput()
            for name in names:
                self._add(shared, name)
            shared.is_closed = True

    def _add(self, shared: SharedInput, name: str):
        members = [*shared.linears, name]
        members.sort(key=self._position.__getitem__)
        shared.linears = {member: self._linears[member] for member in members}
        self._input_of[name] = shared

    def _forget_dead(self):
        self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
