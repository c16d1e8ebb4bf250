# SPDX-License-Identifier: Apache-2.0
"""What is printed after a model was quantized."""

from pathlib import Path

from cat_modifier.hub.run_record import RunRecord
from cat_modifier.markdown import markdown_table

__all__ = ["summary"]


def summary(
    model: str,
    output: Path,
    before: int,
    after: int,
    minutes: float,
    record: RunRecord | None,
) -> str:
    """
    Write what a run has made, and what to do next.

    :param before: bytes of the model
    :param after: bytes of the checkpoint
    :param record: record of CATModifier; None if the recipe has none
    """
    lines = [""]
    if record is not None and record.predictions:
        rows = [
            (kind, str(count), f"{without:.1f}", f"{with_cat:.1f}")
            for kind, count, without, with_cat in record.mean_predictions()
        ]
        header = ("predicted SQNR, dB, mean", "inputs", "without CAT", "with CAT")
        lines += [markdown_table(header, rows), ""]
    lines += [
        f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB, in {minutes:.1f} minutes",
        f"The checkpoint is in {output}. Next:",
        f"    cat-modifier evaluate {output} --base {model}",
        f"    vllm serve {output}",
    ]
    return "\n".join(lines)
