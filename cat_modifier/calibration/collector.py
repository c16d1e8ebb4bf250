# SPDX-License-Identifier: Apache-2.0
"""What calibration learns of the inputs of Linears: their groups, and statistics of each"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.nn import Linear

from cat_modifier.calibration.shared_inputs import SharedInputObserver, SharedInput, padding_mask

__all__ = ["InputCollector"]


class Statistics(Protocol):
    """Of an input"""

    def update(self, tokens: Tensor):
        """
        :param tokens: shape (tokens, d)
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]): ...


StatisticsType = TypeVar("StatisticsType", bound=Statistics)


class InputCollector(Generic[StatisticsType]):
    """
    Watches calls of Linears. Each input is counted once, however many Linears read it.

    :param linears: by full name, in the order of the model
    :param new_statistics: makes what accumulates the statistics of the input of a group
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        new_statistics: Callable[[SharedInput], StatisticsType],
    ):
        self.observer = SharedInputObserver(linears)
        self._new_statistics = new_statistics
        self._masks: dict[int, Tensor] = {}
        # by the first Linear that was called, which may not be the group's owner for ever
        self._statistics: dict[str, StatisticsType] = {}

    def set_attention_mask(self, batch: int, attention_mask: object):
        """
        :param batch: index of the batch, which may pass through the model in several parts
        :param attention_mask: of the batch, in any form that a model passes on; forms that
            cannot be read leave what is known of the batch
        """
        mask = padding_mask(attention_mask)
        if mask is not None:
            self._masks[batch] = mask

    def observe(self, name: str, x: Tensor, batch: int):
        """
        :param name: of the Linear that is called
        :param x: its input, shape (..., d)
        :param batch: index of the batch
        """
        group, is_new = self.observer.observe(name, x)
        if not is_new:
            return
        tokens = x.reshape(-1, x.shape[-1])
        # inputs of another layout (tokens routed to an expert) cannot be matched to a mask
        mask = self._masks.get(batch)
        if mask is not None and mask.numel() == tokens.shape[0]:
            tokens = tokens[mask.flatten().to(tokens.device)]
        key = self._key(group)
        if key is None:
            key = name
            self._statistics[key] = self._new_statistics(group)
        self._statistics[key].update(tokens)

    def pending_groups(self) -> list[SharedInput]:
        """Groups whose statistics were not taken yet, in the order of the model"""
        return [group for group in self.observer.groups if self._key(group) is not None]

    def statistics(self, group: SharedInput) -> StatisticsType:
        """Of a pending group"""
        return self._statistics[self._key(group)]

    def take(self, group: SharedInput) -> StatisticsType:
        """Statistics of a group, which are then forgotten here"""
        return self._statistics.pop(self._key(group))

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on, between two batches"""
        return {
            "groups": [list(group.linears) for group in self.observer.groups],
            "statistics": {name: s.state_dict() for name, s in self._statistics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]):
        self.observer.set_groups(state["groups"], are_closed=False)
        for group in self.observer.groups:
            for name in state["statistics"].keys() & group.linears.keys():
                self._statistics[name] = self._new_statistics(group)
                self._statistics[name].load_state_dict(state["statistics"][name])

    def _key(self, group: SharedInput) -> str | None:
        return next((name for name in group.linears if name in self._statistics), None)
