# SPDX-License-Identifier: Apache-2.0
"""The summary: Linears that lose most, the cause, and what would help."""

import math
from typing import Any

import pandas as pd

from cat_modifier.analysis.comparison import Comparison
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.transforms import TRANSFORMS
from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import parallel_sum, to_db

__all__ = [
    "best_transform",
    "comparison_sentences",
    "diagnose",
    "mean_table",
    "sentences",
    "unpredictable",
]

_DOMINANT = 2.0
"""Ratio of two noises above which only the larger one is named"""

_UNPREDICTABLE = 3.0
"""Difference of prediction and measurement worth a word, dB"""


def mean_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean measured SQNR over all Linears, dB, per transform (rows) and scheme (columns)"""
    return frame.pivot_table(
        index="transform", columns="scheme", values="measured_db", sort=False, dropna=False
    )


def best_transform(frame: pd.DataFrame, scheme: str) -> str:
    """The transform of the highest mean"""
    means = mean_table(frame)[scheme]
    return means.index[0] if means.isna().all() else means.idxmax()


def diagnose(frame: pd.DataFrame, scheme: Scheme, transform: str) -> pd.DataFrame:
    """
    What holds each Linear back under a transform, worst first.

    Concentration is compared with normal data, the result of mixing many channels;
    alignment with the achievable one. The factor that is further below limits the Linear;
    bits do if none is 1 dB below.

    :param frame: rows of an analysis
    :return: columns `layer`; `noise` (weights, activations or both); `limit`; and in dB
        `sqnr`, `concentration_loss` (of the larger noise), `alignment_loss`, and the gain by
        8-bit activations, 8-bit weights and one full block (`gain_activations`,
        `gain_weights`, `gain_full`)
    """
    rows = frame[(frame["scheme"] == scheme.name) & (frame["transform"] == transform)]
    result = pd.DataFrame([_diagnose(row, scheme) for row in rows.itertuples()])
    return result.sort_values("sqnr").reset_index(drop=True)


def _diagnose(row: Any, scheme: Scheme) -> dict[str, str | float]:
    weights = 10 ** (row.measured_weights_db / 10)
    activations = 10 ** (row.measured_activations_db / 10)
    noise = "both"
    if weights > _DOMINANT * activations:
        noise = "activations"
    elif activations > _DOMINANT * weights:
        noise = "weights"

    losses = {}
    for name, args, db in (
        ("weights", scheme.weights, row.weight_concentration_db),
        ("activations", scheme.activations, row.activation_concentration_db),
    ):
        if args is not None and noise in (name, "both"):
            sizes = row.in_features, args.symmetric, args.group_size
            losses[f"concentration of {name}"] = (
                to_db(expected_concentration("normal", *sizes)) - db
            )
    concentration_loss = max(losses.values(), default=math.nan)
    losses["alignment"] = row.achievable_block_db - row.alignment_db
    limit = max(losses, key=losses.get)
    if math.isnan(row.measured_db):
        limit = "nothing: no signal"
    elif losses[limit] < 1:
        limit = "bits"

    def gain(bits: int | None, ratio: float, other: float) -> float:
        """Gain by 8 bits instead of fewer"""
        if bits is None or bits >= 8:
            return math.nan
        more = ratio * ((2**8 - 1) / (2**bits - 1)) ** 2
        return to_db(parallel_sum(more, other)) - row.measured_db

    return {
        "layer": row.layer,
        "sqnr": row.measured_db,
        "noise": noise,
        "limit": limit,
        "concentration_loss": concentration_loss,
        "alignment_loss": losses["alignment"],
        "gain_activations": gain(scheme.bits[1], activations, weights),
        "gain_weights": gain(scheme.bits[0], weights, activations),
        "gain_full": row.achievable_full_db - row.alignment_db,
    }


def unpredictable(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose measured SQNR is far from the predicted one, farthest first"""
    off = (frame["measured_db"] - frame["predicted_db"]).abs().sort_values(ascending=False)
    return frame.loc[off[off > _UNPREDICTABLE].index]


def sentences(frame: pd.DataFrame, scheme: Scheme) -> list[str]:
    """The summary, in words"""
    means = mean_table(frame)[scheme.name]
    count = frame["layer"].nunique()
    first, best = means.index[0], best_transform(frame, scheme.name)
    others = "; ".join(
        f"{TRANSFORMS[name].label} {db:.1f}" for name, db in means.items() if name != best
    )
    text = [
        f"At {scheme.name}, the mean SQNR of {count} Linears is highest with "
        f"{TRANSFORMS[best].label}: {means[best]:.1f} dB" + (f" ({others})." if others else ".")
    ]
    for name in dict.fromkeys((first, best)):
        table = diagnose(frame, scheme, name)
        limits = [f"{limit} ({n})" for limit, n in table["limit"].value_counts().items()]
        text.append(f"With {TRANSFORMS[name].label}, they are limited by {', '.join(limits)}.")
    worst = table.head(max(1, count // 10))  # of the best transform
    gains = {
        "8-bit activations": worst["gain_activations"].mean(),
        "8-bit weights": worst["gain_weights"].mean(),
        "blocks over the whole input": worst["gain_full"].mean(),
    }
    helpful = [f"{gain:.1f} dB by {what}" for what, gain in gains.items() if gain > 0]
    text.append(
        f"The worst tenth then has {worst['sqnr'].mean():.1f} dB on average."
        + (f" It would gain {', '.join(helpful)}." if helpful else "")
    )
    off = unpredictable(frame[frame["scheme"] == scheme.name])
    higher = off["measured_db"] > off["predicted_db"]
    above = (
        "a few large channels set the range, most values round to zero, and their small error "
        "is less than uniform noise"
    )
    below = "a few tokens hold most of the energy, and their errors do not average out"
    for relation, rows, reason in (
        ("above", off[higher], above),
        ("below", off[~higher], below),
    ):
        if len(rows):
            where = rows.iloc[0]
            text.append(
                f"The measurement is more than {_UNPREDICTABLE:.0f} dB {relation} the "
                f"prediction for {rows['layer'].nunique()} Linears, most of all "
                f"{where['layer']} with {TRANSFORMS[where['transform']].label} "
                f"({where['measured_db']:.1f} dB, predicted {where['predicted_db']:.1f}). The "
                f"largest token of their inputs has {rows['largest_token'].median():.0f} times "
                f"the energy of the mean one (median; of all Linears "
                f"{frame['largest_token'].median():.0f}): {reason}."
            )
    return text


def comparison_sentences(comparison: Comparison) -> list[str]:
    """The summary of a checkpoint against its original, in words"""
    original, quantized = comparison.perplexity
    layers = comparison.layers
    worst = [
        f"{row.layer} ({row.measured_db:.1f} dB)"
        for row in layers.nsmallest(3, "measured_db").itertuples()
    ]
    return [
        f"Perplexity is {quantized:.2f}, of the original {original:.2f} "
        f"({comparison.tokens} tokens).",
        f"The KL divergence from the original is {comparison.divergence:.3f} nats per token, "
        f"and the most likely next token is the same for {comparison.agreement:.1%}.",
        f"With the same input, the {len(layers)} quantized Linears have a mean SQNR of "
        f"{layers['measured_db'].mean():.1f} dB; the lowest are {', '.join(worst)}.",
        "Errors of the Linears before them lower the SQNR of their outputs to "
        f"{layers['accumulated_db'].mean():.1f} dB on average.",
    ]
