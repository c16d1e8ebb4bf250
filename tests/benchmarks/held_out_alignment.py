# SPDX-License-Identifier: Apache-2.0
"""
How much of the alignment that a transform gains on the calibration text is left on other texts,
by the structure of the transform: scaling of channels, blocks, scaling and a part of low rank,
the whole matrix. No weight is quantized. Takes a few minutes a model on 2 cores, in the
compress environment.

    python tests/benchmarks/held_out_alignment.py output/smollm2-135m-instruct output/twin \
        --json tests/benchmarks/results/held_out_alignment.json
"""

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from held_out_texts import read_held_out_texts
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Linear, Module
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cat_modifier.calibration.sensitivity import weighted_inputs
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows
from cat_modifier.functional.alignment import (
    DEFAULT_DAMPENING_FRAC,
    dampen,
    geometric_mean,
    inner_blocks,
)
from cat_modifier.functional.sqnr import to_db

Moments = dict[tuple[int, str], Tensor]
"""Second moments by layer and input, shape (d, d), float64, trace 1"""


def blocks(sx: Tensor, sw: Tensor, size: int) -> Tensor:
    """The block-diagonal G of best alignment. All tensors: shape (d, d), float64"""
    sx, sw = (dampen(inner_blocks(one[None], size), DEFAULT_DAMPENING_FRAC) for one in (sx, sw))
    return torch.block_diag(*geometric_mean(torch.linalg.inv(sx), sw))


def low_rank(sx: Tensor, sw: Tensor, rank: int) -> Tensor:
    """
    G of scaled channels, then ``c I + V (S - c) V^T``: V are eigenvectors of the whole optimum
    with the largest or smallest eigenvalues, as many of each as gain most; S is the optimum in
    their span.
    """
    scale = blocks(sx, sw, 1).diagonal().sqrt()
    sx = dampen((sx * scale * scale[:, None])[None], DEFAULT_DAMPENING_FRAC)[0]
    sw = dampen((sw / scale / scale[:, None])[None], DEFAULT_DAMPENING_FRAC)[0]
    size = len(scale)
    vectors = torch.linalg.eigh(blocks(sx, sw, size)).eigenvectors
    best, best_gain = torch.eye(size, dtype=sx.dtype), -float("inf")
    for smallest in range(0, rank + 1, rank // 16):
        chosen = [*range(smallest), *range(size - rank + smallest, size)]
        v = vectors[:, chosen]
        inner_x, inner_w = v.T @ sx @ v, v.T @ sw @ v
        others = (sw.trace() - inner_w.trace()) / (sx.trace() - inner_x.trace())
        identity = torch.eye(size, dtype=sx.dtype)
        inner = geometric_mean(torch.linalg.inv(inner_x), inner_w)
        g = others.sqrt() * (identity - v @ v.T) + v @ inner @ v.T
        if (found := gain(g, sx, sw)) > best_gain:
            best, best_gain = g, found
    return best * scale * scale[:, None]


def gain(g: Tensor, sx: Tensor, sw: Tensor) -> float:
    """Alignment with ``G = T^T T`` over alignment without a transform, dB"""
    cost = (sw * torch.linalg.inv(g)).sum() * (sx * g).sum()
    return to_db((sw.trace() * sx.trace() / cost).item())


STRUCTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaling": partial(blocks, size=1),
    "blocks of 32": partial(blocks, size=32),
    "blocks of 144": partial(blocks, size=144),
    "blocks of 288": partial(blocks, size=288),
    "scaling, rank 64": partial(low_rank, rank=64),
    "scaling, rank 128": partial(low_rank, rank=128),
    "whole matrix": lambda sx, sw: blocks(sx, sw, len(sx)),
}
"""Structures of a transform, for inputs of 576 channels"""


def shrunk(sx: Tensor, fraction: float) -> Tensor:
    """Second moments whose correlations between channels are smaller by a fraction"""
    return (1 - fraction) * sx + fraction * sx.diagonal().diag()


def collect(model: PreTrainedModel, layers: list[int], ids: Tensor) -> Moments:
    """
    Compute second moments of the inputs of attention, whose tokens count by what its output
    feels, and of the MLP.

    :param model: Llama's modules
    :param ids: shape (windows, length)
    """
    moments: Moments = {}
    scales: dict[int, Tensor] = {}
    running: list[Module] = []

    def add(key: tuple[int, str], x: Tensor, weights: Tensor | None = None):
        tokens = x.flatten(0, -2).double()
        weighted = tokens if weights is None else tokens * weights.reshape(-1, 1)
        moments[key] = moments.get(key, 0) + weighted.T @ tokens

    def layer_hook(layer: int, module: Module, args: tuple, kwargs: dict):
        hidden = args[0] if args else kwargs["hidden_states"]
        scales[layer] = 1 / hidden.float().norm(dim=-1, keepdim=True)

    def attention_hook(layer: int, module: Module, args: tuple, kwargs: dict):
        if module in running:
            return
        running.append(module)
        names = ("q_proj", "k_proj", "v_proj")
        linears = {name: module.get_submodule(name) for name in names}
        generator = torch.Generator().manual_seed(layer)
        first, *_ = weighted_inputs(module, args, kwargs, linears, scales[layer], generator)
        running.remove(module)
        add((layer, "qkv"), first.x, first.weights)

    def gate_hook(layer: int, module: Module, args: tuple):
        add((layer, "gate/up"), args[0])

    handles = []
    for index in layers:
        layer = model.model.layers[index]
        for module, hook in ((layer, layer_hook), (layer.self_attn, attention_hook)):
            hook = partial(hook, index)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        gate = partial(gate_hook, index)
        handles.append(layer.mlp.gate_proj.register_forward_pre_hook(gate))
    with torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: value / value.trace() for key, value in moments.items()}


def weight_moments(model: PreTrainedModel, layer: int, what: str) -> Tensor:
    attention, mlp = model.model.layers[layer].self_attn, model.model.layers[layer].mlp
    linears: dict[str, list[Linear]] = {
        "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
        "gate/up": [mlp.gate_proj, mlp.up_proj],
    }
    weights = [one.weight.detach().double() for one in linears[what]]
    return sum(weight.T @ weight for weight in weights)


def measure(path: str, samples: int) -> dict:
    """Return gains in dB by input, structure and text: means over layers"""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    layers = list(range(2, len(model.model.layers), 6))
    calibration = load_texts(EMBEDDED, "train")
    random.Random(0).shuffle(calibration)
    texts = {"calibration": calibration, **read_held_out_texts()}
    found = {
        name: collect(model, layers, windows(text, tokenizer, 512, samples))
        for name, text in texts.items()
    }
    result: dict = {}
    for layer, what in found["calibration"]:
        sw = weight_moments(model, layer, what)
        sx = found["calibration"][layer, what]
        for name, structure in STRUCTURES.items():
            for fraction in (0.0, 0.1, 0.4):
                g = structure(shrunk(sx, fraction), sw)
                label = f"{name}, shrunk by {fraction}" if fraction else name
                row = result.setdefault(what, {}).setdefault(label, {})
                for text, moments in found.items():
                    value = gain(g, moments[layer, what], sw) / len(layers)
                    row[text] = row.get(text, 0) + value
            row = result[what].setdefault(f"{name}, from the text itself", {})
            for text, moments in found.items():
                own = moments[layer, what]
                value = gain(structure(own, sw), own, sw) / len(layers)
                row[text] = row.get(text, 0) + value
    return result


def show(model: str, result: dict):
    for what, rows in result.items():
        texts = list(next(iter(rows.values())))
        table = Table(f"{model}, {what}, dB", *texts)
        for label, row in rows.items():
            table.add_row(label, *(f"{row[text]:.2f}" for text in texts))
        Console(width=140).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=32, help="windows of each text")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    results = {}
    for model in args.models:
        results[Path(model).name] = measure(model, args.samples)
        show(Path(model).name, results[Path(model).name])
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
