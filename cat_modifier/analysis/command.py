# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier analyze`: from its arguments to a report."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from cat_modifier.analysis import layers
from cat_modifier.analysis.comparison import compare
from cat_modifier.analysis.experts import make_experts_linears
from cat_modifier.analysis.report import comparison_report, layer_report, new_report
from cat_modifier.auto_model import load_model, read_config
from cat_modifier.calibration.texts import (
    CALIBRATION_SPLITS,
    HELD_OUT_SPLITS,
    load_texts,
    windows,
)
from cat_modifier.version import __version__

__all__ = ["run"]

_TOKENS_PER_BATCH = 2048


def run(
    model: str,
    output: Path,
    overwrite: bool,
    original: str | None,
    dataset: str,
    split: str | None,
    column: str | None,
    samples: int,
    length: int,
    **options: Any,
):
    """
    Run `cat-modifier analyze`; see its help for the parameters.

    :param options: further arguments of :func:`cat_modifier.analysis.layers.analyze`
    :raises ValueError: if the arguments do not fit each other, the model or the data
    :raises OSError: if a file cannot be read or written
    """
    # check everything that can be checked before a model is loaded
    schemes = layers.parse_names(options["schemes"], options["transforms"])
    options["schemes"] = [scheme.name for scheme in schemes]
    config = read_config(model)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized and original is None:
        raise ValueError(f"{model} is quantized: name the model it was made from as --original")
    if original is not None and not is_quantized:
        raise ValueError(f"{model} is not quantized: leave out --original")

    splits = split or (HELD_OUT_SPLITS if is_quantized else CALIBRATION_SPLITS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = load_texts(dataset, splits, column, tokenizer)
    ids = windows(texts, tokenizer, length, samples)
    batches = ids.split(max(1, _TOKENS_PER_BATCH // length))
    settings: dict[str, Any] = {
        "cat-modifier": __version__,
        "model": model,
        "dataset": f"{dataset} ({split or splits[0]})",
        "tokens": f"{ids.shape[0]} windows of {ids.shape[1]}",
    }
    with new_report(output, overwrite) as folder:
        if original is not None:
            settings["original"] = original
            report = comparison_report(
                compare(_load(original), _load(model), batches), settings
            )
        else:
            settings |= options
            loaded = _load(model)
            make_experts_linears(loaded)
            inputs = [layers.without_predictions(loaded, batch) for batch in batches]
            report = layer_report(layers.analyze(loaded, inputs, **options), settings)
        report.print()
        report.write(folder)
    print(f"\nThe report is in {output / 'report.html'}")


def _load(model: str) -> PreTrainedModel:
    loaded = load_model(model, read_config(model))
    devices = set(map(str, getattr(loaded, "hf_device_map", {}).values()))
    if torch.cuda.is_available() and devices & {"cpu", "disk"}:
        raise ValueError(
            f"{model} does not fit in the memory of the accelerators: use larger or more of "
            "them, or hide them (CUDA_VISIBLE_DEVICES=) to compute on the CPU"
        )
    return loaded
