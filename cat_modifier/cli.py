# SPDX-License-Identifier: Apache-2.0
"""
The command `cat-modifier`.

This module imports nothing heavy: `--help` must answer at once.
"""

import os
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE
from cat_modifier.version import __version__

__all__ = ["main"]

app = typer.Typer(
    help="Concentration-alignment transforms for quantization.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_asked: bool):
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
):
    """Take the options that belong to no command"""


def _need(extra: str, *libraries: str):
    """
    :param libraries: modules that the extra installs
    :raises ValueError: if one is missing
    """
    for name in libraries:
        if find_spec(name) is None:
            raise ValueError(
                f"{name} is not installed. The command needs: "
                f"pip install 'cat-modifier[{extra}]'"
            )


def _log_to_stderr():
    """
    Keep the log of libraries out of the output, which is for results.

    llm-compressor logs to the output that it finds when it is imported.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if find_spec("llmcompressor") is not None:
        with redirect_stdout(sys.stderr):
            import llmcompressor  # noqa: F401


def _check(model: str | None) -> str | None:
    from cat_modifier.model_path import check_model

    try:
        if model is not None:
            check_model(model)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    return model


_DATASET_HELP = (
    "Text: id on the Hub (or id:configuration); a file (.txt, .md, .json, .jsonl, .csv or "
    ".parquet); or texts of the Python installation: pydoc-topics, its documentation; "
    "python-mixed, four kinds."
)
_COLUMN_HELP = "Column of the dataset with texts or chats."
_COLUMN_DEFAULT = "text, or else the first with chats"


@app.command()
def analyze(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", callback=_check, help="Folder, or id on the Hugging Face Hub."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older report in the folder.")
    ] = False,
    original: Annotated[
        str | None,
        typer.Option(
            callback=_check, help="Model that the quantized checkpoint MODEL was made from."
        ),
    ] = None,
    dataset: Annotated[str, typer.Option(help=_DATASET_HELP)] = "pydoc-topics",
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of a dataset on the Hub.",
            show_default="train; with --original: test",
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help=_COLUMN_HELP, show_default=_COLUMN_DEFAULT)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text, at most.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    schemes: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Quantization schemes, separated by commas. W4A8: symmetric 4-bit weights per "
            "channel, asymmetric 8-bit activations per token. W4G64A8G64: per group of 64 "
            "channels. 16 bits are not quantized. The summary is about the first scheme.",
        ),
    ] = "W4A4,W4A8,W8A8,W6A6",
    transforms: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            show_default="all but cat-full",
            help="Transforms to compare, from the list above, separated by commas.",
        ),
    ] = "none,scaling,hadamard,block-hadamard,cat-scaling,cat,cat-block-hadamard,"
    "cat-eigen-hadamard",
    transform_block_size: Annotated[
        int, typer.Option(min=1, help="Channels per block of CAT, an upper bound.")
    ] = 128,
    targets: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Linears to analyze: name, class or re: pattern. Repeat for several.",
        ),
    ] = ["Linear"],  # noqa: B006
    ignore: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Linears to leave out: name, class or re: pattern. Repeat for several.",
        ),
    ] = list(DEFAULT_IGNORE),  # noqa: B006
):
    """
    Show what limits the accuracy of each Linear.

    Predicts and measures the quantization error of every Linear of a causal language model
    under several schemes and transforms. With --original, measures a quantized checkpoint
    against the model it was made from; schemes, transforms and patterns are not used then.

    Writes tables, figures and report.html.

    \b
    Transforms:
      none                nothing
      scaling             SmoothQuant, one scale per channel
      hadamard            Hadamard over the whole input
      block-hadamard      Hadamard within blocks
      cat-scaling         CAT with blocks of one channel, then Hadamard
      cat                 CAT with blocks, then Hadamard over the whole input
      cat-block-hadamard  CAT with blocks, then Hadamard within blocks
      cat-eigen-hadamard  the same, after a rotation to the eigenvectors
      cat-full            CAT with one block over the whole input: memory grows
                          with the square of the input size, time with the cube
    """
    arguments = locals()
    arguments |= {"schemes": schemes.split(","), "transforms": transforms.split(",")}

    _log_to_stderr()
    from cat_modifier.analysis.command import run

    run(**arguments)


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", callback=_check, help="Folder, or id on the Hugging Face Hub."
        ),
    ],
    recipe: Annotated[
        str, typer.Option(help="Name of a recipe of this package, as w4a4, or a YAML file.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the checkpoint.", show_default=False)
    ] = None,
    dataset: Annotated[str, typer.Option(help=_DATASET_HELP)] = "python-mixed",
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of a dataset on the Hub.", show_default="train, train_sft, or the only"
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help=_COLUMN_HELP, show_default=_COLUMN_DEFAULT)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text, at most.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint in the folder.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Load no weights and write nothing: show which Linears are transformed and "
            "quantized, what the checkpoint will weigh, and what transforms cost.",
        ),
    ] = False,
):
    """
    Quantize a model with a recipe.

    Loads the model, calibrates it on text with llm-compressor, and writes a checkpoint for
    vLLM and Transformers.
    """
    arguments = locals()
    _need("compress", "llmcompressor")

    _log_to_stderr()
    from cat_modifier.quantize.command import run

    run(**arguments)


class Engine(StrEnum):
    """Library that computes tasks"""

    HF = "hf"
    VLLM = "vllm"


@app.command()
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            callback=_check,
            help="Folder, or id on the Hugging Face Hub, of any model.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(callback=_check, help="Model that the checkpoint was made from."),
    ] = None,
    dataset: Annotated[str, typer.Option(help=_DATASET_HELP)] = "pydoc-topics",
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of a dataset on the Hub.",
            show_default="test, test_sft, validation, or the only",
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help=_COLUMN_HELP, show_default=_COLUMN_DEFAULT)
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Windows of text, at most. 0 measures tasks alone.")
    ] = 48,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    tasks: Annotated[
        str, typer.Option(metavar="NAME,...", help="Tasks of lm-eval, separated by commas.")
    ] = "",
    model: Annotated[
        Engine, typer.Option(help="Library that computes the tasks: Transformers, or vLLM.")
    ] = Engine.HF,
    model_args: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Further arguments of lm-eval's model, as max_model_len=2048.",
        ),
    ] = "",
    include_path: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder with tasks of your own."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task, at most.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
):
    """
    Measure what a checkpoint has kept of its base.

    On text, by Transformers: perplexity, and with --base also KL divergence and top-1
    agreement. With --tasks, tasks of lm-eval. Prints a table, which also goes into the model
    card in the checkpoint's folder. Results on datasets of the Hub go into .eval_results, too.
    """
    arguments = locals() | {"model": str(model)}
    if tasks:
        _need("evaluate", "lm_eval")
        if model is Engine.VLLM:
            _need("serve", "vllm")
        else:
            _need("evaluate", "accelerate")

    _log_to_stderr()
    from cat_modifier.evaluate.command import run

    run(**arguments)


@app.command()
def allocate(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="Folder that `cat-modifier analyze` made.")
    ],
    bits: Annotated[
        float,
        typer.Option(
            help="Mean bits of the factors of all multiply-adds, weights and activations, at "
            "most."
        ),
    ] = 4.5,
    transform: Annotated[
        str, typer.Option(help="Transform of the report that the recipe makes.")
    ] = "cat",
    output: Annotated[Path, typer.Option(help="File for the recipe.")] = Path("recipe.yaml"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
):
    """
    Make a recipe with more bits where they matter.

    Chooses W4A4, W4A8 or W8A8 for each Linear, from a report with at least two of these
    schemes, and writes a recipe of CATModifier and QuantizationModifier.
    """
    from cat_modifier.analysis.allocation import run

    run(report, bits, transform, output, overwrite)


@app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="A checkpoint."),
    ],
):
    """
    Check that a CAT checkpoint is the one that was saved.

    Compares all files that were saved with their digests in SHA256SUMS. Loading
    checks the quantization_config and the transforms only.
    """
    from cat_modifier.checkpoint.verify import find_damage

    if damage := find_damage(folder):
        raise ValueError("; ".join(damage) + ". Copy or download it again")
    print(f"{folder} is the checkpoint that was saved")


@app.command()
def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", exists=True, file_okay=False, help="A checkpoint."),
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="Repository on the Hugging Face Hub: USER/NAME."),
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Let all read it. Default: you alone.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to.", show_default="main")
    ] = None,
):
    """
    Upload a CAT checkpoint to the Hugging Face Hub.

    Checks that the checkpoint is whole and that the Hub takes its model card,
    then uploads all files in one commit. Repeat the command if it was stopped.
    """
    from cat_modifier.hub.push import push

    print(push(folder, repo, public, revision))


def main():
    """Run the command; an error that a user can mend is one line, without a traceback"""
    try:
        app(prog_name="cat-modifier")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. The command needs: pip install 'cat-modifier[analyze]'")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        # of safetensors, which is not imported for --help: a full disk, for one
        if type(error).__name__ != "SafetensorError":
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
