# SPDX-License-Identifier: Apache-2.0
"""
Models larger than memory: time and peak memory of CATModifier and of GPTQModifier for each
decoding layer, in llm-compressor's sequential pipeline, with all weights offloaded to disk.
Layers of real widths with random weights, each side in a process of its own. Runs in the
compress environment.

    python tests/benchmarks/large_models.py --json tests/benchmarks/results/large_models.json
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

MODELS = {
    # Llama-3-8B
    "dense": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    # half of the experts of a layer of Qwen3-30B-A3B
    "64 experts": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
SIDES = ("loading", "CATModifier", "GPTQModifier")


def make_model(name: str, layers: int, folder: Path):
    """Save a model of random weights, bfloat16"""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "vocab_size": 1024, "tie_word_embeddings": True}
    config = AutoConfig.for_model(**MODELS[name], **sizes, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<0>": 0}, unk_token="<0>"))  # oneshot wants one
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>").save_pretrained(folder)


def run(side: str, folder: str, samples: int, length: int) -> dict:
    """Calibrate in a process of its own"""
    import torch
    from compressed_tensors.offload import load_offloaded_model
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import int_scheme

    from cat_modifier import CATModifier

    with TemporaryDirectory() as offload, load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="auto_offload",
            max_memory={"cpu": 0},
            offload_folder=offload,
        )
        ends = []
        bases = {"CATModifier": CATModifier, "GPTQModifier": GPTQModifier}
        if side in bases:

            class Timed(bases[side]):
                def on_sequential_epoch_end(self, state, event, **kwargs):
                    super().on_sequential_epoch_end(state, event, **kwargs)
                    ends.append(time.perf_counter())

            recipe = Timed(**(int_scheme(4, None) if side == "GPTQModifier" else {}))
            ids = torch.randint(1024, (samples, length))
            oneshot(
                model=model,
                recipe=recipe,
                dataset=DataLoader([{"input_ids": one} for one in ids]),
                pipeline="sequential",
            )
        else:
            linearize_moe(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    return {"peak memory, GB": peak / 2**20, "seconds of each layer": times}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("\nresult", json.dumps(run(args.side, args.folder, args.samples, args.length)))
        return

    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.models:
        with TemporaryDirectory() as folder:
            make_model(name, args.layers, Path(folder))
            weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            tokens = args.samples * args.length
            result = {"tokens": tokens, "layers": args.layers, "weights, GB": weights / 2**30}
            for side in SIDES:
                print(f"{name}: {side}", file=sys.stderr)
                command = [sys.executable, __file__, "--side", side, "--folder", folder]
                command += ["--samples", str(args.samples), "--length", str(args.length)]
                process = subprocess.run(command, capture_output=True, text=True)
                lines = [x for x in process.stdout.splitlines() if x.startswith("result")]
                if not lines:
                    raise SystemExit(process.stderr)
                one = json.loads(lines[0].removeprefix("result"))
                times = one.pop("seconds of each layer")
                result[side] = one | ({"seconds a layer": median(times)} if times else {})
        results[name] = result
        print(name, json.dumps(result, indent=2))
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
