# SPDX-License-Identifier: Apache-2.0
"""`cat-modifier analyze`: from its arguments to a report"""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from cat_modifier.analysis.comparison import compare
from cat_modifier.analysis.experts import make_experts_linears
from cat_modifier.analysis.layers import UnseenLinearsError, analyze
from cat_modifier.analysis.passes import without_predictions
from cat_modifier.analysis.report import (
    comparison_tables,
    layer_tables,
    write_comparison_report,
    write_layer_report,
)
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.workspace import Workspace
from cat_modifier.calibration.texts import load_texts, windows
from cat_modifier.version import __version__

__all__ = ["run"]

_TOKENS_PER_BATCH = 2048

Result = TypeVar("Result")


def run(args: Namespace):
    """
    :raises ValueError: if the arguments do not fit each other, the model or the data
    :raises OSError: if a file cannot be read or written
    :raises UnseenLinearsError: if some Linears saw no tokens, after the report is written
    """
    # all that can be refused at once, before anything is loaded
    schemes = [Scheme.parse(name) for name in args.schemes]
    if args.samples < 1 or args.length < 2:
        raise ValueError("--samples must be 1 and --length 2 at least")
    for model in filter(None, (args.model, args.original)):
        if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
            raise ValueError(f"There is no folder {model}")
    config = AutoConfig.from_pretrained(args.model)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if is_quantized and args.original is None:
        raise ValueError(
            f"{args.model} is quantized: name the model which it was made of with --original, "
            "to compare the two"
        )
    if args.original is not None and not is_quantized:
        raise ValueError(f"{args.model} is not quantized: leave out --original")

    split = args.split or ("test" if is_quantized else "train")
    texts = load_texts(args.dataset, split, args.column)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = windows(texts, tokenizer, args.length, args.samples)
    if len(ids) < args.samples:
        logger.info(f"The text has {len(ids)} windows of {args.length} tokens")
    batches = ids.split(max(1, _TOKENS_PER_BATCH // args.length))
    settings = {
        "cat-modifier": __version__,
        "model": args.model,
        "model_sha256": _fingerprint(args.model, config),
        "dataset": f"{args.dataset} ({split})",
        "tokens": f"{ids.shape[0]} windows of {ids.shape[1]}",
        "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
    }
    if is_quantized:
        settings["original"] = args.original
        _compare(args, batches, settings)
    else:
        settings |= {
            "schemes": [scheme.name for scheme in schemes],
            "transforms": args.transforms,
            "block_size": args.block_size,
            "targets": args.targets,
            "ignore": args.ignore,
        }
        _analyze(args, batches, schemes, settings)


def _analyze(
    args: Namespace, batches: Sequence[Tensor], schemes: list[Scheme], settings: dict[str, Any]
):
    with Workspace(args.output, settings, args.overwrite) as workspace:
        model = _load(args.model)
        make_experts_linears(model)
        frame, unseen = _despite_unseen(
            lambda: analyze(
                model,
                [without_predictions(model, batch) for batch in batches],
                [scheme.name for scheme in schemes],
                args.transforms,
                args.targets,
                args.ignore,
                args.block_size,
                workspace,
            )
        )
        workspace.publish(lambda to: write_layer_report(to, frame, schemes, settings))
    _tell(args, layer_tables(frame, schemes), unseen)


def _compare(args: Namespace, batches: Sequence[Tensor], settings: dict[str, Any]):
    with Workspace(args.output, settings, args.overwrite) as workspace:
        original, quantized = _load(args.original), _load(args.model)
        comparison, unseen = _despite_unseen(
            lambda: compare(original, quantized, batches, workspace)
        )
        workspace.publish(lambda to: write_comparison_report(to, comparison, settings))
    _tell(args, comparison_tables(comparison), unseen)


def _despite_unseen(compute: Callable[[], Result]) -> tuple[Result, UnseenLinearsError | None]:
    """Results of what saw tokens, and an error to raise when they are written"""
    try:
        return compute(), None
    except UnseenLinearsError as error:
        if error.results is None:
            raise
        return error.results, error


def _tell(args: Namespace, tables: object, unseen: UnseenLinearsError | None):
    console = Console()
    console.print(tables)
    path = Path(args.output) / "report.html"
    console.print(f"The report is in {path}", markup=False, highlight=False)
    if unseen is not None:
        raise unseen


def _load(model: str) -> PreTrainedModel:
    device_map = "auto" if torch.cuda.is_available() else None
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map=device_map)
    devices = {str(device) for device in getattr(loaded, "hf_device_map", {}).values()}
    if device_map is not None and devices & {"cpu", "disk"}:
        raise ValueError(
            f"{model} does not fit in the memory of the accelerators: use larger or more of "
            "them, or hide them (CUDA_VISIBLE_DEVICES=) to compute on the CPU"
        )
    return loaded.eval()


def _fingerprint(model: str, config: PretrainedConfig) -> str:
    """Of the weights: the commit of a repository, or the state of the files in a folder"""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(Path(model).glob("*.safetensors"))
    ]
    state = files or getattr(config, "_commit_hash", None)
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
