# SPDX-License-Identifier: Apache-2.0
"""
Serve a checkpoint of 4-bit floats on a CPU through vLLM's own emulation, in a process of its
own, and write to a JSON file how that differs from a checkpoint in Transformers.

    python run_emulated.py SERVED EXPECTED FILE

vLLM has these kernels in its lists for GPUs alone. Its NVFP4 kernel is plain PyTorch. Its
MXFP4 kernel calls two functions of AMD Quark, which has them for GPUs alone: they are written
out here, after version 1.0 of the OCP's Microscaling specification.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Linear, Module

ELEMENTS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Values of E2M1, by their three bits"""

BIAS = 127
"""Of E8M0"""


def power_of_2(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents)


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    assert packed.dtype == torch.uint8
    bits = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()
    values = torch.where(bits > 7, -1.0, 1.0) * ELEMENTS[bits & 7]
    groups = values.unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales[..., None]).flatten(-2)


def dq_mxfp4(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    assert scales.dtype == torch.uint8 and scales.shape[-1] * 16 == packed.shape[-1]
    return unpack(packed, power_of_2(scales.int() - BIAS)).to(dtype)


def qdq_mxfp4(x: Tensor, scale_calculation_mode: str = "even") -> Tensor:
    assert scale_calculation_mode == "even"
    groups = x.float().unflatten(-1, (-1, 32))
    # exponent of the largest value, rounded to the two significant bits of E2M1
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    exponent = exponent - 1 + (mantissa >= 0.875)
    scales = power_of_2((exponent - 2).clamp(min=-BIAS))  # 6, the largest, is 1.5 * 2 ** 2
    scaled = (groups / scales).clamp(-6, 6)
    step = power_of_2(torch.frexp(scaled)[1].clamp(min=1) - 2)
    return ((scaled / step).round() * step * scales).flatten(-2).to(x.dtype)


def stand_in_for_quark():
    for name in ("quark", "quark.torch", "quark.torch.kernel", "quark.torch.kernel.mx"):
        sys.modules[name] = ModuleType(name)
    mx = sys.modules["quark.torch.kernel.mx"]
    mx.dq_mxfp4, mx.qdq_mxfp4 = dq_mxfp4, qdq_mxfp4
    sys.modules["quark.torch.kernel"].mx = mx
    sys.modules["quark"].__spec__ = torch.__spec__  # vLLM asks whether there is one


stand_in_for_quark()

from transformers import AutoModelForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.kernels import linear as kernels  # noqa: E402
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.fusion import fused_act_quant  # noqa: E402
from vllm.model_executor.layers.fusion.quant_activation import (  # noqa: E402
    get_input_quant_key,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    kNvfp4Dynamic,
)
from vllm.platforms.interface import PlatformEnum  # noqa: E402

import cat_modifier  # noqa: E402, F401

PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class NvFp4Kernel(kernels.EmulationNvFp4LinearKernel):
    """The emulation; says that it takes quantized inputs, as kernels of FlashInfer do"""

    def input_quant_key(self):
        return kNvfp4Dynamic


def quantize_too_early(x: Tensor, linear: Module):
    raise AssertionError(f"{linear.prefix} would get an input that was not transformed")


def prepare_vllm():
    cpu = PlatformEnum.CPU
    kernels.register_linear_kernel(NvFp4Kernel, cpu, "nvfp4")
    kernels.register_linear_kernel(kernels.EmulationMxfp4LinearKernel, cpu, "mxfp4")
    # what the MLP of Llama asks for in front of down_proj on Blackwell
    fused_act_quant._FUSED_ACT_QUANT[SiluAndMul, kNvfp4Dynamic] = quantize_too_early


def load_in_transformers(folder: Path, ids: Tensor) -> Module:
    """Load the model, to compute in float32"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model(ids)  # decompresses the weights, to bfloat16
    Module.float(model)
    tensors = load_file(folder / "model.safetensors")
    for name, module in linears(model).items():
        scales = tensors[f"{name}.weight_scale"]
        if scales.dtype == torch.float8_e4m3fn:  # NVFP4 has more digits than bfloat16
            scales = scales.float() / tensors[f"{name}.weight_global_scale"]
            weight = unpack(tensors[f"{name}.weight_packed"], scales)
            assert torch.allclose(weight, module.weight, rtol=2**-7)
            module.weight.copy_(weight)
    return model


def linears(model: Module) -> dict[str, Linear]:
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, Linear) and ".layers." in name
    }


def keep_inputs_and_outputs(model: Module) -> tuple[dict, dict]:
    inputs, outputs = {}, {}
    for name, module in linears(model).items():
        # before the hook that transforms the input
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0][0]), prepend=True
        )
        module.register_forward_hook(
            lambda _, args, out, name=name: outputs.__setitem__(name, out[0])
        )
    return inputs, outputs


def compare(model: Module, inputs: dict, outputs: dict) -> dict:
    found = {}
    for name, layer in model.named_modules():
        parent, _, end = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in PARTS.get(end, [end])]
        if parts[0] not in inputs:
            continue
        expected = torch.cat([outputs[part] for part in parts], -1)
        out, _ = layer(inputs[parts[0]])
        found[name] = {
            "error": ((out - expected).norm() / expected.norm()).item(),
            "method": type(layer.quant_method).__name__,
            "takes_quantized_input": get_input_quant_key(layer) is not None,
        }
    return found


@torch.inference_mode()
def main(served: Path, expected: Path, file: Path):
    prepare_vllm()
    ids = torch.tensor(json.loads((expected / "reference.json").read_text())["ids"][0])
    reference = load_in_transformers(expected, ids[None])
    inputs, outputs = keep_inputs_and_outputs(reference)
    logprobs = reference(ids[None]).logits[0, :-1].log_softmax(-1)

    llm = LLM(str(served), dtype="float32", enforce_eager=True, max_model_len=256)
    (layers,) = llm.apply_model(lambda model: compare(model, inputs, outputs))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (request,) = llm.generate([{"prompt_token_ids": ids.tolist()}], params, use_tqdm=False)
    found = [
        entry[token].logprob
        for token, entry in zip(ids[1:].tolist(), request.prompt_logprobs[1:], strict=True)
    ]
    result = {
        "layers": layers,
        "logprobs": found,
        "expected": logprobs.gather(1, ids[1:, None])[:, 0].tolist(),
    }
    file.write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
