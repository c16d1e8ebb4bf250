# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints read by another class than the one that wrote them.

``AutoModel`` reads the body of a model, whose modules then lack the prefix that they have
beside a head. A classifier put on a language model has a head that is in no file.
"""

from collections.abc import Callable, Iterable

from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from torch.nn import Linear
from transformers import PreTrainedModel

from cat_modifier.checkpoint.schema import CATTransformConfig

__all__ = ["find_new_heads", "rename_modules"]


def rename_modules(
    model: PreTrainedModel, quantization: QuantizationConfig, transforms: CATTransformConfig
):
    """
    Write the names that modules have in a model into the configs of a checkpoint.

    Names that are no module's, with or without the prefix of the body, stay as they are.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> str:
        others = (name, name.removeprefix(prefix), f"{prefix}{name}")
        return next((other for other in others if other in names), name)

    quantization.ignore = _rename_all(quantization.ignore, rename)
    for scheme in quantization.config_groups.values():
        scheme.targets = _rename_all(scheme.targets, rename)
    for _, args in transforms.inputs():
        args.targets = _rename_all(args.targets, rename)
    transforms.fused = {rename(name): rename(other) for name, other in transforms.fused.items()}


def find_new_heads(model: PreTrainedModel, files: Iterable[str]) -> list[str]:
    """
    List the Linears of a head that the checkpoint does not have.

    :param files: safetensors files of the checkpoint
    :return: names of Linears outside of the body. None if the checkpoint was written by the
        model's class: it should then have all
    """
    if type(model).__name__ in (model.config.architectures or []):
        return []
    body = set(model.base_model.modules())
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module not in body
    ]
    stored = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            stored |= {key.rpartition(".")[0] for key in file.keys()}
    return [name for name in heads if name not in stored]


def _rename_all(names: Iterable[str], rename: Callable[[str], str]) -> list[str]:
    return [rename(name) for name in names]
