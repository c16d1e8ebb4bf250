# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a checkpoint on texts, and how far its predictions are from its base's."""

import math
from collections import defaultdict

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from cat_modifier.evaluate.results import Measure
from cat_modifier.functional.predictions import compare_predictions

__all__ = ["measure_texts"]


@torch.no_grad()
def measure_texts(
    model: PreTrainedModel, base: PreTrainedModel | None, ids: Tensor, name: str
) -> list[Measure]:
    """
    Measure perplexity, and with a base KL divergence and top-1 agreement.

    Standard errors are those over windows: tokens of one window depend on each other.

    :param base: model that the checkpoint was made from; None for none
    :param ids: token ids, shape (windows, length)
    :param name: name of the texts
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for window in tqdm(ids.split(1), desc="Predicting"):
        logits = _logits(model, window)
        reference = None if base is None else _logits(base, window).to(logits.device)
        means = compare_predictions(window.to(logits.device), logits, reference)
        for key, value in means.items():
            found[key].append(value.cpu())
    values = {key: torch.cat(parts) for key, parts in found.items()}

    loss, loss_error = _mean(values["loss"])
    perplexity = Measure(
        f"perplexity, {name}",
        math.exp(loss),
        math.exp(loss) * loss_error,
        higher_is_better=False,
    )
    if base is None:
        return [perplexity]
    base_loss, base_error = _mean(values["reference_loss"])
    return [
        Measure(
            perplexity.name,
            perplexity.value,
            perplexity.error,
            math.exp(base_loss),
            math.exp(base_loss) * base_error,
            higher_is_better=False,
        ),
        Measure(f"KL divergence, {name}", *_mean(values["divergence"])),
        Measure(f"top-1 agreement, {name}", *_mean(values["agreement"])),
    ]


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    return model(input_ids=window.to(model.device), use_cache=False).logits


def _mean(values: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error, NaN of a single value"""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error
