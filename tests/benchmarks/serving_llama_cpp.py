# SPDX-License-Identifier: Apache-2.0
"""
Tokens/s of llama.cpp with Q4_0 weights, to compare with serving.py: the same model, made by
make_serving_models.py, the same numbers of tokens. Q and K are not permuted as llama.cpp
expects them: its text is noise, at the same speed. Runs in an environment of its own:

    pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0 \
        safetensors torch==2.13.0
    python tests/benchmarks/serving_llama_cpp.py FOLDER/bf16
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import gguf
from gguf import GGMLQuantizationType, quants
from llama_cpp import Llama
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(model: Path, file: Path, head: GGMLQuantizationType):
    """
    Write a Llama model whose head is tied to its embedding as GGUF.

    :param head: type of the embedding
    """
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: Tensor, kind: GGMLQuantizationType | None = None):
        values = tensor.float().numpy()
        if kind is not None:
            values = quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)

    add("token_embd", tensors["model.embed_tokens.weight"], head)
    add("output_norm", tensors["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in NAMES.items():
            weight = tensors[f"model.layers.{layer}.{ours}.weight"]
            add(f"blk.{layer}.{theirs}", weight, GGMLQuantizationType.Q4_0)
        for ours, theirs in (
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            add(f"blk.{layer}.{theirs}", tensors[f"model.layers.{layer}.{ours}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    for head in (GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0):
        with TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            convert(args.model, file, head)
            model = Llama(
                str(file),
                n_ctx=1024,
                n_batch=512,
                n_threads=args.threads,
                n_threads_batch=args.threads,
                verbose=False,
            )
            decode, prefill = [], []
            for _ in range(args.rounds):
                model.reset()
                model.eval(list(range(2, 18)))
                start = time.perf_counter()
                for token in range(64):
                    model.eval([token + 2])
                decode.append(64 / (time.perf_counter() - start))
                model.reset()
                start = time.perf_counter()
                model.eval(list(range(2, 514)))
                prefill.append(512 / (time.perf_counter() - start))
        for name, values in (("decode, 1", decode), ("prefill, 1 x 512", prefill)):
            print(
                f"Q4_0, head {head.name}, {name}: {median(values):.0f} tokens/s "
                f"({min(values):.0f} to {max(values):.0f})"
            )


if __name__ == "__main__":
    main()
