# SPDX-License-Identifier: Apache-2.0
"""
Quantize a causal language model with a recipe.

    python examples/quantize.py MODEL --recipe w4a4 --output output/my-model-w4a4
    python examples/quantize.py MODEL --recipe my-recipe.yaml --output output/my-model \
        --dataset HuggingFaceH4/ultrachat_200k --split train_sft --column prompt
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import cat_modifier
from cat_modifier.calibration.texts import MIXED, load_texts, windows
from cat_modifier.model_path import check_model


def find_recipe(name: str) -> str:
    """Find a recipe by its name or the name of a YAML file"""
    if Path(name).is_file():
        return name
    if Path(name).suffix in (".yaml", ".yml"):
        raise FileNotFoundError(f"There is no file {name}")
    return cat_modifier.recipe(name)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.strip().partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="folder, or id on the Hugging Face Hub")
    parser.add_argument(
        "--recipe", required=True, help="name of a recipe in recipes/, as w4a4, or a YAML file"
    )
    parser.add_argument("--output", required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--dataset",
        default=MIXED,
        help="id on the Hub (or id:configuration); a .txt, .md, .json, .jsonl, .csv or "
        ".parquet file; pydoc-topics, the documentation of Python; or python-mixed, text of "
        "four kinds of the Python installation",
    )
    parser.add_argument(
        "--split",
        default="train",
        help="split of a dataset on the Hub; of the last two, train and test are one half each",
    )
    parser.add_argument("--column", default="text", help="column that holds the text")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    args = parser.parse_args()

    try:
        check_model(args.model)
        recipe = find_recipe(args.recipe)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    device_map = "auto" if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype="auto", device_map=device_map
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = load_texts(args.dataset, args.split, args.column)
    ids = windows(texts, tokenizer, args.length, args.samples)
    dataset = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=dataset,
        num_calibration_samples=len(dataset),
        max_seq_length=args.length,
        shuffle_calibration_samples=False,
        output_dir=args.output,
    )


if __name__ == "__main__":
    main()
