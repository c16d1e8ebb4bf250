# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in real vLLM, held against the same sums in Transformers"""

import json
from pathlib import Path

import pytest
import torch
from conftest import serve, sqnr_db
from safetensors.torch import save_file
from torch.nn import Module
from transformers import AutoModelForCausalLM

import cat_modifier  # noqa: F401

RANK = 8
QK = ["q_proj", "k_proj"]
ATTENTION = [*QK, "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Adapted(Module):
    """A Linear with an adapter beside it, which reads the input before any transform"""

    def __init__(self, linear: Module, dtype: torch.dtype):
        super().__init__()
        self.linear = linear
        a = torch.randn(RANK, linear.in_features) / linear.in_features**0.5
        self.a, self.b = a.to(dtype), (torch.randn(linear.out_features, RANK) / 10).to(dtype)

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


@torch.no_grad()
def adapt(checkpoint: Path, targets: list[str], folder: Path) -> tuple[list, list]:
    """
    Write an adapter as PEFT does.

    :return: token ids, and their log-probabilities without the adapter and with it
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    ids = torch.tensor(json.loads((checkpoint / "reference.json").read_text())["ids"])
    logprobs = [logprobs_of(model, ids)]
    tensors = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            adapted = Adapted(module, model.dtype)
            model.set_submodule(name, adapted)
            for side, tensor in (("A", adapted.a), ("B", adapted.b)):
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = tensor
    logprobs.append(logprobs_of(model, ids))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ids.tolist(), logprobs


def logprobs_of(model, ids: torch.Tensor) -> torch.Tensor:
    logprobs = model(ids).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0]


def serve_adapter(checkpoint: Path, ids: list, folder: Path, **options) -> dict:
    options = {"enable_lora": True, "max_lora_rank": RANK, "dtype": "float32"} | options
    return serve(checkpoint, ids, options=options, adapter=str(folder))


@pytest.mark.parametrize(
    "name, targets, dtype",
    [
        ("llama-w4a8", [*ATTENTION, *MLP], "float32"),
        ("qwen3-w4a4-int-quantized", [*QK, *MLP], "float32"),
        ("llama-w8a8", [*QK, *MLP], "float32"),
        ("llama-w4a16", [*QK, *MLP], "bfloat16"),
        ("qwen3-moe-w4a4", QK, "float32"),
    ],
)
def test_adapters_add_to_what_layers_compute(checkpoints, tmp_path, name, targets, dtype):
    ids, (without, expected) = adapt(checkpoints / name, targets, tmp_path)
    # not of the lm_head, with which vLLM on CPUs cannot compute the logprobs of a prompt
    options = {"dtype": dtype, "lora_target_modules": targets}
    result = serve_adapter(checkpoints / name, ids, tmp_path, **options)
    assert not result["error"], result["log"]
    found = torch.tensor(result["logprobs"])
    sqnr = sqnr_db(found, expected)
    assert sqnr > 25, f"{sqnr:.1f} dB"
    assert sqnr_db(found, without) < 15


def test_adapters_of_attention_values_are_refused_if_those_are_transformed(
    checkpoints, tmp_path
):
    checkpoint = checkpoints / "qwen2-w4a4"
    ids, _ = adapt(checkpoint, ATTENTION, tmp_path)
    result = serve_adapter(checkpoint, ids, tmp_path)
    assert result["error"]
    assert "The LoRA adapter changes model.layers.0.self_attn.o_proj" in result["log"]
    assert "CATModifier(fuse_attention=False)" in result["log"]


def test_adapters_of_experts_are_refused(checkpoints, tmp_path):
    checkpoint = checkpoints / "qwen3-moe-w4a4"
    ids, _ = adapt(checkpoint, QK, tmp_path)
    result = serve_adapter(checkpoint, ids, tmp_path)
    assert result["error"]
    assert "LoRA cannot change experts of this quantization" in result["log"]
