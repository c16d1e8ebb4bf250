# SPDX-License-Identifier: Apache-2.0
"""Which tokens of the calibration data are real, and which are padding."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["PaddingMasks", "padding_mask", "predicted_tokens", "real_tokens"]


class PaddingMasks:
    """
    Masks of the real tokens of each batch, as modules are called with them.

    An encoder and a decoder have masks of their own. A Linear of the decoder that reads what
    the encoder returns has that of the encoder.

    :param model: the model whose modules are called
    """

    def __init__(self, model: Module):
        self._encoder = _encoder_name(model)
        # by batch, and by whether the tokens are those of an encoder
        self._masks: dict[tuple[int, bool], Tensor] = {}
        self._counts: dict[tuple[int, bool], int] = {}
        self._certain: set[tuple[int, bool]] = set()
        self._encoder_states: weakref.ref[Tensor] | None = None

    def note(self, name: str, kwargs: Mapping[str, Any], batch: int):
        """
        Note that a module is called.

        :param name: full name of the module
        :param kwargs: keyword arguments of the call; masks of unknown form are ignored
        :param batch: index of the batch
        """
        mask = kwargs.get("attention_mask")
        if self._holds_both(name):
            self._set((batch, True), mask)
            self._set((batch, False), kwargs.get("decoder_attention_mask"))
            # without a mask, all tokens of the decoder are real
            self._certain.add((batch, False))
            return
        is_cross_attention = False
        for key in ("encoder_hidden_states", "key_value_states"):
            if isinstance(states := kwargs.get(key), Tensor):
                self._encoder_states = weakref.ref(states)
                is_cross_attention = "encoder_attention_mask" not in kwargs
        if not is_cross_attention:  # else the mask is that of the encoder
            self._set((batch, self._is_in_encoder(name)), mask)

    @contextmanager
    def watching(self, model: Module, batch: int) -> Iterator[None]:
        """Context in which the modules of a model are called with one batch"""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if next(module.children(), None) is not None:

                    def note(module: Module, args: tuple, kwargs: dict, name: str = name):
                        self.note(name, kwargs, batch)

                    handle = module.register_forward_pre_hook(note, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def of(self, name: str, batch: int, x: Tensor | None = None) -> Tensor | None:
        """
        Find the mask of an input.

        :param name: full name of the module that reads it
        :param batch: index of the batch
        :param x: the input; None for that of the decoder, in a decoder
        :return: shape (batch, tokens), bool, true for real tokens; None if none is known
        """
        return self._masks.get(self._key(name, batch, x))

    def count(self, name: str, batch: int, x: Tensor) -> int:
        """
        Count the real tokens of an input.

        :param x: shape (..., d)
        """
        tokens, key = x.numel() // x.shape[-1], self._key(name, batch, x)
        mask = self._masks.get(key)
        if mask is None or mask.numel() != tokens:
            return tokens
        if key not in self._counts:  # to ask a GPU for each input would take longer
            self._counts[key] = int(mask.sum())
        return self._counts[key]

    def _set(self, key: tuple[int, bool], mask: object):
        # masks of two dimensions are those of the data, or of what an encoder makes of it:
        # trust them over those that layers derive
        is_of_data = isinstance(mask, Tensor) and mask.ndim == 2
        if key in self._certain and not is_of_data:
            return
        if is_of_data:
            self._certain.add(key)
        if (found := padding_mask(mask)) is not None:
            self._masks[key] = found.clone()  # it may be a view of one many times as large
            self._counts.pop(key, None)

    def _key(self, name: str, batch: int, x: Tensor | None) -> tuple[int, bool]:
        return batch, self._is_encoder_states(x) or self._is_in_encoder(name)

    def _is_encoder_states(self, x: Tensor | None) -> bool:
        states = None if self._encoder_states is None else self._encoder_states()
        if x is None or states is None or self._encoder is None:
            return False
        return x.data_ptr() == states.data_ptr() and x.shape == states.shape

    def _holds_both(self, name: str) -> bool:
        return self._encoder is not None and (not name or self._encoder.startswith(f"{name}."))

    def _is_in_encoder(self, name: str) -> bool:
        return self._encoder is not None and f"{name}.".startswith(f"{self._encoder}.")


def _encoder_name(model: Module) -> str | None:
    """Find the full name of the encoder of an encoder-decoder; None for other models"""
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_encoder", None)
    if find is None or not getattr(config, "is_encoder_decoder", False):
        return None
    encoder = find()  # the model itself, where Transformers knows no encoder
    return next((name for name, one in model.named_modules() if name and one is encoder), None)


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """
    Leave out padding.

    :param x: shape (..., d)
    :param mask: shape (batch, tokens), bool, true for real tokens. None, or a mask of another
        number of tokens, leaves out nothing: tokens may be routed to an expert
    :return: shape (tokens, d)
    """
    tokens = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != len(tokens):
        return tokens
    return tokens[mask.flatten().to(tokens.device)]


def predicted_tokens(model: Module, sample: Mapping[str, Any]) -> Tensor | None:
    """
    Find the tokens whose predictions count: in an encoder-decoder, those of the decoder.

    :param sample: keyword arguments of the model
    :return: true for real tokens, false for padding, shape (batch, tokens), bool; None if the
        sample has no attention mask
    """
    config: Any = getattr(model, "config", None)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    name = "decoder_attention_mask" if is_encoder_decoder else "attention_mask"
    return padding_mask(sample.get(name))


def padding_mask(attention_mask: object) -> Tensor | None:
    """
    Find the real tokens in an attention mask.

    Known forms:

    - shape (batch, tokens): true or 1 for real tokens
    - shape (batch, heads, queries, keys), bool: true where a query sees a key; or, if all
      of the future is true, true where a key is hidden
    - shape (batch, heads, queries, keys), numbers: 0 is added to scores of visible keys

    With queries and keys, a token is real if it sees itself.

    :param attention_mask: the mask
    :return: shape (batch, tokens), bool, true for real tokens; None if the form is not known
    """
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 2:
        return attention_mask.bool()
    if attention_mask.ndim == 4 and attention_mask.shape[-1] == attention_mask.shape[-2]:
        to_itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        if to_itself.dtype != torch.bool:
            return to_itself == 0
        size = attention_mask.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=to_itself.device).triu(1)
        marks_hidden = not to_itself.all() and bool(attention_mask[:, 0, future].all())
        return ~to_itself if marks_hidden else to_itself
    return None
