# SPDX-License-Identifier: Apache-2.0
"""
Make the configs of models of Llama's widths that `serving_gpu.py` serves with made-up weights.

    python tests/benchmarks/make_gpu_configs.py FOLDER

One layer of each width goes through llm-compressor; its config is then that of all layers.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from llmcompressor import oneshot
from make_serving_models import RECIPES, SHAPE
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import make_loader, make_model  # noqa: E402

ONE_LAYER = SHAPE | {"vocab_size": 2048, "num_hidden_layers": 1}
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "tied": False}
WIDTHS = {
    # name: (one layer, number of layers)
    "1b": (ONE_LAYER, 16),
    "8b": (ONE_LAYER | WIDE, 32),
}


def repeat_layer(config: dict, layers: int):
    """Let a config of one layer describe a model of many, with the vocabulary of Llama 3"""

    def names(text: str) -> list[str]:
        return [text.replace("layers.0.", f"layers.{index}.") for index in range(layers)]

    config |= {"vocab_size": 128256, "num_hidden_layers": layers}
    config["max_position_embeddings"] = 8192
    if "layer_types" in config:
        config["layer_types"] *= layers
    transforms = config.get("quantization_config", {}).get("transform_config")
    if not transforms:
        return
    for scheme in transforms["config_groups"].values():
        scheme["apply"] = [
            one | {"targets": list(targets)}
            for one in scheme["apply"]
            for targets in zip(*(names(target) for target in one["targets"]), strict=True)
        ]
    transforms["fused"] = {
        name: values
        for pair in transforms["fused"].items()
        for name, values in zip(*(names(one) for one in pair), strict=True)
    }
    transforms["sha256"] = None  # of weights that are made up


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for width, (shape, layers) in WIDTHS.items():
        with TemporaryDirectory() as folder:
            original = Path(folder) / "bf16"
            make_model(original, **shape)
            for side, recipe in RECIPES.items():
                model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
                data = make_loader(torch.randint(2, 2048, (4, 64)))
                output = str(Path(folder) / side)
                oneshot(model=model, recipe=recipe(), dataset=data, output_dir=output)
            for side in ("bf16", *RECIPES):
                config = json.loads((Path(folder) / side / "config.json").read_text())
                repeat_layer(config, layers)
                target = args.folder / width / side
                target.mkdir(parents=True, exist_ok=True)
                (target / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
