# SPDX-License-Identifier: Apache-2.0
"""
Print a table of the perplexities that `cat-modifier evaluate` has written into FOLDER.json
for checkpoints in FOLDER. One of them, at least, was evaluated with --base.

    python examples/compare.py MODEL output/w4a4 ...
"""

import argparse
import json
from pathlib import Path

from cat_modifier.checkpoint.size import weight_bytes
from cat_modifier.markdown import markdown_table


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("model", type=Path, help="folder of the model that they were made from")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="FOLDER")
    args = parser.parse_args()

    files = [json.loads(Path(f"{folder}.json").read_text()) for folder in args.checkpoints]
    measures = [file["measures"][0] for file in files]
    base = next(one["base"] for one in measures if one["base"] is not None)
    perplexities = [base, *(one["value"] for one in measures)]
    rows = []
    for folder, perplexity in zip((args.model, *args.checkpoints), perplexities, strict=True):
        rows.append((folder.name, f"{perplexity:.2f}", f"{weight_bytes(folder) / 1e6:.0f}"))
    tokens = files[0]["windows"] * files[0]["length"]
    print(markdown_table((f"{tokens:,} held-out tokens", "perplexity", "MB"), rows))


if __name__ == "__main__":
    main()
