# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier`"""

import argparse
import signal
import sys

_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    from cat_modifier.analysis.layers import DEFAULT_SCHEMES, DEFAULT_TRANSFORMS
    from cat_modifier.analysis.transforms import TRANSFORMS
    from cat_modifier.calibration.shared_inputs import DEFAULT_IGNORE
    from cat_modifier.calibration.texts import EMBEDDED

    parser = argparse.ArgumentParser(
        prog="cat-modifier", description="Concentration-alignment transforms for quantization"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    analyze = commands.add_parser(
        "analyze",
        help="what limits the accuracy of each Linear of a model when it is quantized",
        description="Predict and measure the quantization error of every Linear of a causal "
        "language model under several schemes and transforms; or, of a quantized checkpoint, "
        "measure it against the original. Writes tables, figures and report.html. An "
        "analysis that was interrupted goes on when its command is repeated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    analyze.set_defaults(run=_analyze)
    add = analyze.add_argument
    add("model", help="folder, or id on the Hugging Face Hub")
    add("--output", default="report", help="folder for the report")
    add("--overwrite", action="store_true", help="replace an older report in the folder")
    add("--original", help="of a quantized checkpoint: the model which it was made of")
    add(
        "--dataset",
        default=EMBEDDED,
        help="id on the Hub (or id:configuration), a .txt, .json, .jsonl, .csv or .parquet "
        "file, or the documentation of Python",
    )
    add("--split", help="of a dataset of the Hub (default: train; test for a checkpoint)")
    add("--column", default="text", help="of the dataset that holds the text")
    add("--samples", type=int, default=128, help="windows of text, at most")
    add("--length", type=int, default=512, help="tokens of a window")
    add = analyze.add_argument_group("of models which are not quantized").add_argument
    add(
        "--schemes",
        nargs="+",
        default=list(DEFAULT_SCHEMES),
        help="as W4A8 (channel-wise symmetric weights, token-wise asymmetric activations), "
        "or W4G64A8G64 (groups of 64 channels); 16 bits are not quantized. The first one is "
        "what the summary is about",
    )
    add(
        "--transforms",
        nargs="+",
        metavar="TRANSFORM",
        choices=list(TRANSFORMS),
        default=list(DEFAULT_TRANSFORMS),
        help=f"to compare, of {', '.join(TRANSFORMS)}. cat-full takes memory in the square "
        "and time in the cube of the input size",
    )
    add("--block-size", type=int, default=128, help="of CAT, an upper bound")
    add("--targets", nargs="+", default=["Linear"], help="names, classes or re: patterns")
    add("--ignore", nargs="*", default=list(DEFAULT_IGNORE), help="exceptions from them")

    allocate = commands.add_parser(
        "allocate",
        help="a recipe with more bits where they matter, from a report of `analyze`",
        description="Choose W4A4, W4A8 or W8A8 for each Linear, and write a recipe of "
        "CATModifier and QuantizationModifier. The report should have the schemes to choose "
        "from, as it has by default.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    allocate.set_defaults(run=_allocate)
    add = allocate.add_argument
    add("report", help="folder which `cat-modifier analyze` has written")
    add(
        "--bits",
        type=float,
        default=4.5,
        help="budget: mean bits of the factors of all multiply-adds, weights and activations",
    )
    add("--transform", default="cat", help="of the report, by which SQNR was measured")
    add("--output", default="recipe.yaml", help="file for the recipe")
    return parser


def _allocate(args: argparse.Namespace):
    from cat_modifier.analysis.allocation import run

    run(args)


def _analyze(args: argparse.Namespace):
    from cat_modifier.analysis.command import run

    run(args)


def main():
    """Entry point: errors that a user can mend are one line, without a traceback"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args = _parser().parse_args()
        args.run(args)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. The command needs: pip install 'cat-modifier[analyze]'")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted. Repeat the command to go on.", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
