# SPDX-License-Identifier: Apache-2.0
"""
Which Linears read the same input, found by observing the forward pass.

A transform belongs to an input, not to a Linear: q, k and v read one tensor, so do gate
and up, or the gates of all experts of a mixture. They form a group and share a transform.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Linear

__all__ = ["DEFAULT_IGNORE", "SharedInputObserver", "SharedInput", "padding_mask"]

DEFAULT_IGNORE = ("re:.*lm_head", "re:.*vision.*", "re:.*visual.*")
"""Linears which are left alone unless a user says otherwise: heads and vision towers"""


@dataclass
class SharedInput:
    """
    Linears which read the same input.

    :param linears: by full name, in the order of the model
    :param is_closed: whether no further Linear joins, whatever its input
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    is_closed: bool = False

    @property
    def owner(self) -> str:
        """Name of the first Linear, under which the transform of the group is stored"""
        return next(iter(self.linears))

    @property
    def features(self) -> int:
        """d, size of the input"""
        return self.linears[self.first].in_features


class SharedInputObserver:
    """
    Puts Linears into groups as they are called.

    Two Linears are in a group if they are called with one and the same tensor: the same
    memory, seen in the same way, not written to in between, and still alive.

    :param linears: the Linears to group, by full name, in the order of the model
    """

    def __init__(self, linears: Mapping[str, Linear]):
        self._position = {name: index for index, name in enumerate(linears)}
        self._linears = linears
        self._group_of: dict[str, SharedInput] = {}
        self._seen: dict[tuple, tuple[weakref.ref, SharedInput]] = {}

    @property
    def groups(self) -> list[SharedInput]:
        """All groups, in the order of the model"""
        unique = {id(group): group for group in self._group_of.values()}
        return sorted(unique.values(), key=lambda group: self._position[group.first])

    def observe(self, name: str, x: Tensor) -> tuple[SharedInput, bool]:
        """
        Record that a Linear is called.

        :param name: of the Linear
        :param x: its input
        :return: its group, and whether this input is new to it: True for the first member
            of a group that is called with ``x``, False for those which follow
        """
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
        reference, group = self._seen.get(key, (None, None))
        is_new = reference is None or reference() is None
        if name not in self._group_of:
            if is_new or group.is_closed:
                group = SharedInput()
            self._add(group, name)
        # an input may be shared by chance after the first batch: count it for each group
        is_new = is_new or group is not self._group_of[name]
        if is_new:
            self._forget_dead()
            self._seen[key] = (weakref.ref(x), self._group_of[name])
        return self._group_of[name], is_new

    def set_groups(self, groups: Iterable[Iterable[str]], are_closed: bool = True):
        """
        Make groups in advance.

        :param groups: the names of their Linears
        :param are_closed: whether no further Linear joins, whatever its input
        """
        for names in groups:
            group = SharedInput()
            for name in names:
                self._add(group, name)
            group.is_closed = are_closed

    def _add(self, group: SharedInput, name: str):
        members = [*group.linears, name]
        members.sort(key=self._position.__getitem__)
        group.linears = {member: self._linears[member] for member in members}
        self._group_of[name] = group

    def _forget_dead(self):
        self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}


def padding_mask(attention_mask: object) -> Tensor | None:
    """
    Which tokens are real, from any attention mask a model passes on.

    :param attention_mask: shape (batch, tokens), true or 1 for real tokens; or
        (batch, heads, queries, keys), where a real token can attend to itself: true, or 0
        added to its score
    :return: shape (batch, tokens), bool; None if the mask is of another kind
    """
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 2:
        return attention_mask.bool()
    if attention_mask.ndim == 4 and attention_mask.shape[-1] == attention_mask.shape[-2]:
        to_itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        if to_itself.dtype == torch.bool:
            return to_itself
        return to_itself == 0
    return None
