# SPDX-License-Identifier: Apache-2.0
"""The summary: the Linears that lose most, the cause, and what would help."""

import math

import numpy as np
import pandas as pd

from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.comparison import Comparison
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.functional.distributions import expected_concentration
from cat_modifier.functional.sqnr import joint_db, to_db

__all__ = ["best_transform", "comparison_sentences", "diagnose", "mean_table", "sentences"]

_DOMINANT = to_db(2)
"""Difference of two noises, dB. Above it, only the larger noise is named"""

_UNPREDICTABLE = 3.0
"""Difference between prediction and measurement, dB. Larger ones are mentioned"""


def mean_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean measured SQNR, dB, per transform (rows) and scheme (columns)"""
    return frame.pivot_table(
        index="transform", columns="scheme", values="measured_db", sort=False, dropna=False
    )


def best_transform(frame: pd.DataFrame, scheme: str) -> str:
    """Find the transform with the highest mean SQNR"""
    means = mean_table(frame)[scheme]
    return means.index[0] if means.isna().all() else means.idxmax()


def diagnose(frame: pd.DataFrame, scheme: Scheme, transform: str) -> pd.DataFrame:
    """
    Find what limits each Linear under a transform.

    Concentration is compared with the concentration of normal data, the result of mixing many
    channels. Alignment is compared with the achievable alignment. The factor with the larger
    loss is the limit. If both lose less than 1 dB, the bit width is the limit.

    Columns of the result:

    - `layer`; `sqnr`, dB; `limit`
    - `noise`: the larger noise, `weights`, `activations` or `both`
    - `concentration_loss`, dB: loss of the factor with the larger noise
    - `alignment_loss`, dB
    - `gain_activations`, `gain_weights`, `gain_full`, dB: gain by 8-bit activations, 8-bit
      weights and one full block

    :param frame: rows of an analysis
    :return: one row per Linear, the lowest SQNR first
    """
    rows = frame[(frame["scheme"] == scheme.name) & (frame["transform"] == transform)]
    weights, activations = rows["measured_weights_db"], rows["measured_activations_db"]
    difference = weights - activations
    larger = [difference > _DOMINANT, difference < -_DOMINANT]
    noise = np.select(larger, ["activations", "weights"], "both")
    losses, gains = pd.DataFrame(index=rows.index), {}
    for name, args, db, other in (
        ("weights", scheme.weights, weights, activations),
        ("activations", scheme.activations, activations, weights),
    ):
        gains[name] = math.nan
        if args is not None:
            normal = [
                to_db(expected_concentration("normal", d, args.symmetric, args.group_size))
                for d in rows["in_features"]
            ]
            loss = normal - rows[f"{name.removesuffix('s')}_concentration_db"]
            losses[f"concentration of {name}"] = loss.where(np.isin(noise, [name, "both"]))
            if args.num_bits < 8:
                more = 20 * math.log10((2**8 - 1) / (2**args.num_bits - 1))
                gains[name] = joint_db(db + more, other) - rows["measured_db"]
    losses["alignment"] = rows["achievable_block_db"] - rows["alignment_db"]
    limit = losses.fillna(-math.inf).idxmax(axis=1).where(losses.max(axis=1) >= 1, "bits")
    columns = {
        "layer": rows["layer"],
        "sqnr": rows["measured_db"],
        "noise": noise,
        "limit": limit.mask(rows["measured_db"].isna(), "nothing: no signal"),
        "concentration_loss": losses.filter(like="concentration").max(axis=1),
        "alignment_loss": losses["alignment"],
        "gain_activations": gains["activations"],
        "gain_weights": gains["weights"],
        "gain_full": rows["achievable_full_db"] - rows["alignment_db"],
    }
    return pd.DataFrame(columns).sort_values("sqnr").reset_index(drop=True)


def sentences(frame: pd.DataFrame, scheme: Scheme) -> list[str]:
    """Write the summary of an analysis"""
    means = mean_table(frame)[scheme.name].rename(index=lambda name: TRANSFORMS[name].label)
    best = best_transform(frame, scheme.name)
    label = TRANSFORMS[best].label
    others = [f"{name} {db:.1f}" for name, db in means.items() if name != label]
    count = frame["layer"].nunique()
    text = [
        f"At {scheme.name}, the mean SQNR of {count} Linears is highest with {label}: "
        f"{means[label]:.1f} dB" + (f" ({'; '.join(others)})." if others else ".")
    ]
    for name in dict.fromkeys((frame["transform"].iloc[0], best)):
        table = diagnose(frame, scheme, name)
        limits = [f"{limit} ({n})" for limit, n in table["limit"].value_counts().items()]
        text.append(f"With {TRANSFORMS[name].label}, they are limited by {', '.join(limits)}.")
    worst = table.head(max(1, count // 10)).mean(numeric_only=True)  # of the best transform
    ways = "8-bit activations", "8-bit weights", "blocks over the whole input"
    gains = zip(worst[["gain_activations", "gain_weights", "gain_full"]], ways, strict=True)
    helpful = [f"{gain:.1f} dB by {way}" for gain, way in gains if gain > 0]
    text.append(
        f"The worst tenth then has {worst['sqnr']:.1f} dB on average."
        + (f" It would gain {', '.join(helpful)}." if helpful else "")
    )
    frame = frame[frame["scheme"] == scheme.name]
    error = (frame["measured_db"] - frame["predicted_db"]).abs().sort_values(ascending=False)
    off = frame.loc[error[error > _UNPREDICTABLE].index]
    is_above = off["measured_db"] > off["predicted_db"]
    above = "most values round to zero, and their small error is less than uniform noise"
    below = "a few tokens hold most of the energy, and their errors do not average out"
    for relation, reason, rows in (
        ("above", f"a few large channels set the range, {above}", off[is_above]),
        ("below", below, off[~is_above]),
    ):
        if len(rows):
            row = rows.iloc[0]
            text.append(
                f"The measurement is more than {_UNPREDICTABLE:.0f} dB {relation} the "
                f"prediction for {rows['layer'].nunique()} Linears, most of all {row['layer']} "
                f"with {TRANSFORMS[row['transform']].label} ({row['measured_db']:.1f} dB, "
                f"predicted {row['predicted_db']:.1f}). The largest token of their inputs has "
                f"{rows['largest_token'].median():.0f} times the energy of the mean one "
                f"(median; of all Linears {frame['largest_token'].median():.0f}): {reason}."
            )
    return text


def comparison_sentences(comparison: Comparison) -> list[str]:
    """Write the summary of a comparison"""
    layers, perplexity = comparison.layers, comparison.perplexity
    worst = [
        f"{row.layer} ({row.measured_db:.1f} dB)"
        for row in layers.nsmallest(3, "measured_db").itertuples()
    ]
    return [
        f"Perplexity is {perplexity['checkpoint']:.2f}; the original has "
        f"{perplexity['original']:.2f} ({comparison.tokens} tokens).",
        f"The KL divergence from the original is {comparison.kl_divergence:.3f} nats per "
        "token, and the most likely next token is the same for "
        f"{comparison.top1_agreement:.1%}.",
        f"With the same input, the {len(layers)} quantized Linears have a mean SQNR of "
        f"{layers['measured_db'].mean():.1f} dB; the lowest are {', '.join(worst)}.",
        "Errors of the Linears before them lower the SQNR of their outputs to "
        f"{layers['accumulated_db'].mean():.1f} dB on average.",
    ]
