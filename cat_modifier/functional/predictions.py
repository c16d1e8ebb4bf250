# SPDX-License-Identifier: Apache-2.0
"""Next-token predictions of a model, and how far they are from those of another."""

import torch
from torch import Tensor

__all__ = ["compare_predictions"]


def compare_predictions(
    ids: Tensor, logits: Tensor, reference: Tensor | None = None
) -> dict[str, Tensor]:
    """
    Compute means over the tokens of each window but its first, which nothing predicts.

    :param ids: token ids, shape (windows, length)
    :param logits: logits of a model, shape (windows, length, vocabulary)
    :param reference: logits of the model it was made from, the same shape; None for none
    :return: shape (windows,), float64. `loss`: negative log-likelihood, nats; with a reference
        also `reference_loss`, `divergence`: KL divergence from the reference, nats, and
        `agreement`: share of tokens with the same most likely next token
    :raises ValueError: if the vocabularies differ
    """
    labels = ids[:, 1:, None]
    found = logits[:, :-1].float().log_softmax(-1)
    means = {"loss": -_mean(found.gather(-1, labels)[..., 0])}
    if reference is None:
        return means
    if reference.shape != logits.shape:
        raise ValueError(
            f"The models have vocabularies of {logits.shape[-1]} and {reference.shape[-1]} "
            "tokens, and cannot be compared: is it the model that was quantized?"
        )
    expected = reference[:, :-1].float().log_softmax(-1)
    return means | {
        "reference_loss": -_mean(expected.gather(-1, labels)[..., 0]),
        "divergence": _mean((expected.exp() * (expected - found)).sum(-1)),
        "agreement": _mean(expected.argmax(-1) == found.argmax(-1)),
    }


def _mean(values: Tensor) -> Tensor:
    return values.to(torch.float64).mean(-1)
