# SPDX-License-Identifier: Apache-2.0
"""
Make a twin of a Llama-shaped model that computes the same and is harder to quantize: gains of
norms are folded into the weights, and the residual stream is rotated by a random orthogonal
matrix. No channel is larger than others then, so that scaling channels gains nothing.

    python tests/benchmarks/make_twin.py output/smollm2-135m-instruct output/twin
"""

import argparse

import torch
from torch import Tensor
from torch.nn import Linear, Parameter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def random_rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(normal)
    return orthogonal * triangular.diagonal().sign()


def write(linear: Linear, weight: Tensor):
    linear.weight = Parameter(weight.to(linear.weight.dtype))


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int = 0):
    """
    Rotate the residual stream, without a change of what the model computes.

    :param model: Llama's modules, without biases of o_proj and down_proj
    """
    body = model.model
    rotation = random_rotation(model.config.hidden_size, seed)
    embedding = body.embed_tokens.weight.double()
    model.config.tie_word_embeddings = False
    readers = [([model.lm_head], body.norm)]
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        readers.append((projections, layer.input_layernorm))
        readers.append(([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm))
        for linear in (attention.o_proj, mlp.down_proj):
            write(linear, rotation.T @ linear.weight.double())
    for linears, norm in readers:
        for linear in linears:
            write(linear, (linear.weight.double() * norm.weight.double()) @ rotation)
        norm.weight.fill_(1)
    body.embed_tokens.weight = Parameter((embedding @ rotation).to(model.dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = torch.arange(10, 74)[None]
    with torch.no_grad():
        before = model(ids).logits
        rotate(model, arguments.seed)
        after = model(ids).logits
    error = ((after - before).norm() / before.norm()).item()
    assert error < 1e-4, f"the twin computes something else: relative error {error}"
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)
    print(f"{arguments.output}: the same function, relative error {error:.0e}")


if __name__ == "__main__":
    main()
