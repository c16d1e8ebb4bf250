# SPDX-License-Identifier: Apache-2.0
"""What calibration learns of the inputs of Linears: their groups, moments and a sample"""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import Linear

from cat_modifier.calibration.groups import GroupObserver, InputGroup, padding_mask
from cat_modifier.calibration.moments import BlockMoments, TokenSample

__all__ = ["InputCalibration"]


class InputCalibration:
    """
    Watches calls of Linears. Each input is counted once, however many Linears read it.

    :param linears: by full name, in the order of the model
    :param block_size: from a group to k, the size of the blocks of its moments
    :param sample_size: tokens to keep of each input
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        block_size: Callable[[InputGroup], int],
        sample_size: int,
    ):
        self.observer = GroupObserver(linears)
        self._block_size = block_size
        self._sample_size = sample_size
        self._masks: dict[int, Tensor] = {}
        # by the first Linear that was called, which may not be the group's owner for ever
        self._statistics: dict[str, tuple[BlockMoments, TokenSample]] = {}

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
            key, size = name, self._block_size(group)
            self._statistics[key] = (
                BlockMoments(group.features, size),
                TokenSample(self._sample_size),
            )
        for statistic in self._statistics[key]:
            statistic.update(tokens)

    def pending_groups(self) -> list[InputGroup]:
        """Groups whose statistics were not taken yet, in the order of the model"""
        return [group for group in self.observer.groups if self._key(group) is not None]

    def take(self, group: InputGroup) -> tuple[BlockMoments, TokenSample]:
        """Statistics of a group, which are then forgotten here"""
        return self._statistics.pop(self._key(group))

    def _key(self, group: InputGroup) -> str | None:
        return next((name for name in group.linears if name in self._statistics), None)
