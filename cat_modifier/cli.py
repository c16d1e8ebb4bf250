# SPDX-License-Identifier: Apache-2.0
"""The command `cat-modifier`"""

import argparse
import hashlib
import signal
import sys

_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    from cat_modifier.analysis.layers import (
        DEFAULT_IGNORE,
        DEFAULT_SCHEMES,
        DEFAULT_TRANSFORMS,
    )
    from cat_modifier.analysis.transforms import TRANSFORMS
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
        choices=list(TRANSFORMS),
        default=list(DEFAULT_TRANSFORMS),
        help="to compare. cat-full takes memory in the square and time in the "
        "cube of the input size",
    )
    add("--block-size", type=int, default=128, help="of CAT, an upper bound")
    add("--targets", nargs="+", default=["Linear"], help="names, classes or re: patterns")
    add("--ignore", nargs="*", default=list(DEFAULT_IGNORE), help="exceptions from them")
    return parser


def _analyze(args: argparse.Namespace):
    import torch
    from rich.console import Console
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from cat_modifier.analysis.comparison import compare
    from cat_modifier.analysis.layers import UnseenLinears, analyze
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

    # all that can be refused at once, before anything is loaded
    schemes = [Scheme.parse(name) for name in args.schemes]
    if args.samples < 1 or args.length < 2:
        raise ValueError("--samples must be 1 and --length 2 at least")
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
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_texts(args.dataset, split, args.column)
    ids = windows(texts, tokenizer, args.length, args.samples)
    batches = list(ids.split(max(1, 2048 // args.length)))

    settings = {
        "model": args.model,
        "dataset": f"{args.dataset} ({split})",
        "tokens": f"{ids.shape[0]} windows of {ids.shape[1]}",
        "tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
    }
    if is_quantized:
        settings["original"] = args.original
    else:
        settings |= {
            "schemes": [scheme.name for scheme in schemes],
            "transforms": args.transforms,
            "block_size": args.block_size,
            "targets": args.targets,
            "ignore": args.ignore,
        }

    def load(model: str) -> torch.nn.Module:
        device_map = "auto" if torch.cuda.is_available() else None
        return AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", device_map=device_map
        ).eval()

    console = Console()
    with Workspace(args.output, settings, args.overwrite) as workspace:
        if is_quantized:
            comparison = compare(load(args.original), load(args.model), batches, workspace)
            workspace.publish(lambda to: write_comparison_report(to, comparison, settings))
            console.print(comparison_tables(comparison))
        else:
            model = load(args.model)
            unseen = None
            try:
                frame = analyze(
                    model,
                    [without_predictions(model, batch) for batch in batches],
                    schemes,
                    args.transforms,
                    args.targets,
                    args.ignore,
                    args.block_size,
                    workspace,
                )
            except UnseenLinears as error:
                if error.results.empty:
                    raise
                unseen, frame = error, error.results
            workspace.publish(lambda to: write_layer_report(to, frame, schemes, settings))
            console.print(layer_tables(frame, schemes))
    console.print(f"The report is in {args.output}/report.html", highlight=False)
    if not is_quantized and unseen is not None:
        raise unseen


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
