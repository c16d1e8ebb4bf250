# SPDX-License-Identifier: Apache-2.0
"""What a person wants to know first: which Linears lose most, to what, and what would help"""

import math

import pandas as pd

from cat_modifier.analysis.comparison import Comparison
from cat_modifier.analysis.measure import LayerResult
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
"""Ratio of two noises from which on the larger one is named alone"""

_UNPREDICTABLE = 3.0
"""dB between prediction and measurement which are worth a word"""


def mean_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean of measured SQNR over all Linears, in dB: a row a transform, a column a scheme"""
    return frame.pivot_table(
        index="transform", columns="scheme", values="measured_db", sort=False, dropna=False
    )


def best_transform(frame: pd.DataFrame, scheme: str) -> str:
    """That of the highest mean"""
    means = mean_table(frame)[scheme]
    return means.index[0] if means.isna().all() else means.idxmax()


def diagnose(frame: pd.DataFrame, scheme: Scheme, transform: str) -> pd.DataFrame:
    """
    What holds each Linear back under a transform, worst first.

    Of the factors of theorem 2.4, concentration is compared with that of normal data, which
    is what mixing many channels leads to, and alignment with what is achievable; the factor
    that is further below is what limits the Linear, and bits if none is 1 dB below.

    :param frame: rows of :class:`LayerResult`
    :return: columns `layer`; `noise` (weights, activations or both); `limit`; and in dB
        `sqnr`, `concentration_loss` (of the larger noise), `alignment_loss`, and what would
        be gained by 8-bit activations, by 8-bit weights and by a full block
        (`gain_activations`, `gain_weights`, `gain_full`)
    """
    rows = frame[(frame["scheme"] == scheme.name) & (frame["transform"] == transform)]
    result = pd.DataFrame([_diagnose(row, scheme) for row in rows.itertuples()])
    return result.sort_values("sqnr").reset_index(drop=True)


def _diagnose(row: LayerResult, scheme: Scheme) -> dict[str, str | float]:
    weights, activations = (
        10 ** (db / 10) for db in (row.measured_weights_db, row.measured_activations_db)
    )
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
            level = expected_concentration(
                "normal", row.in_features, args.symmetric, args.group_size
            )
            losses[f"concentration of {name}"] = to_db(level) - db
    concentration_loss = max(losses.values(), default=float("nan"))
    losses["alignment"] = row.achievable_block_db - row.alignment_db
    limit = max(losses, key=losses.get)
    if math.isnan(row.measured_db):
        limit = "nothing: no signal"
    elif losses[limit] < 1:
        limit = "bits"

    def gain(bits: int | None, ratio: float, other: float) -> float:
        """By 8 bits of what has fewer now"""
        if bits is None or bits >= 8:
            return math.nan
        more = ratio * ((2**8 - 1) / (2**bits - 1)) ** 2
        return to_db(parallel_sum(more, other)) - row.measured_db

    weight_bits, activation_bits = scheme.bits
    return {
        "layer": row.layer,
        "sqnr": row.measured_db,
        "noise": noise,
        "limit": limit,
        "concentration_loss": concentration_loss,
        "alignment_loss": losses["alignment"],
        "gain_activations": gain(activation_bits, activations, weights),
        "gain_weights": gain(weight_bits, weights, activations),
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
        limits = diagnose(frame, scheme, name)["limit"].value_counts()
        text.append(
            f"With {TRANSFORMS[name].label}, what limits them is "
            + ", ".join(f"{limit} ({number})" for limit, number in limits.items())
            + "."
        )
    table = diagnose(frame, scheme, best)
    worst = table.head(max(1, count // 10))
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
    for rows, relation, reason in (
        (
            off[higher],
            "above",
            "a few large channels set the range, most values round to zero, and their error, "
            "as small as they are, is less than uniform noise",
        ),
        (
            off[~higher],
            "below",
            "a few tokens hold most of the energy, and their errors do not average out",
        ),
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
    """A checkpoint against its original, in words"""
    original, quantized = comparison.perplexity
    layers = comparison.layers
    worst = layers.nsmallest(3, "measured_db")
    return [
        f"Perplexity is {quantized:.2f}, of the original {original:.2f} "
        f"({comparison.tokens} tokens).",
        f"The KL divergence from the original is {comparison.divergence:.3f} nats a token, and "
        f"the most likely next token is the same for {comparison.agreement:.1%}.",
        f"With the same input, the {len(layers)} quantized Linears have a mean SQNR of "
        f"{layers['measured_db'].mean():.1f} dB; the lowest are "
        + ", ".join(f"{row.layer} ({row.measured_db:.1f} dB)" for row in worst.itertuples())
        + ".",
        f"Errors of the Linears before them lower that of their outputs to "
        f"{layers['accumulated_db'].mean():.1f} dB on average.",
    ]
