# SPDX-License-Identifier: Apache-2.0
"""
Check that a load found exactly the tensors that a CAT checkpoint must hold.

Transformers fills tensors that a checkpoint lacks with random values, skips those that the
model does not know, and takes any shape for a quantized model. It warns at most. It also
renames tensors while it loads them, so that their names in the files prove nothing: only
the loader knows which tensor went where.
"""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from compressed_tensors.quantization.utils import is_module_quantized
from safetensors import SafetensorError, safe_open
from torch.nn import Linear, Module
from transformers import PreTrainedModel

from cat_modifier.checkpoint.names import layer_of
from cat_modifier.checkpoint.schema import TRANSFORM_NAME
from cat_modifier.checkpoint.transform_module import CATTransform
from cat_modifier.integrations.transformers.experts import LinearExperts

__all__ = ["LoadingCheck", "check_files"]

_REPORT_METHOD = "_adjust_missing_and_unexpected_keys"
"""Method of a model to which the loader hands its report; there is no public one"""


class LoadingCheck:
    """
    Compares the tensors of one load with those that the model needs.

    :param model: with transforms and quantized Linears, before its weights are loaded
    :raises NotImplementedError: if this Transformers reports in another way
    """

    def __init__(self, model: PreTrainedModel):
        if not hasattr(model, _REPORT_METHOD):
            raise NotImplementedError(
                f"Transformers {transformers.__version__} does not report which tensors it "
                "loaded, so that missing ones would go unnoticed: load CAT checkpoints with "
                "a version that this release of cat-modifier supports"
            )
        self._model = model
        self._pass_on = getattr(model, _REPORT_METHOD)
        self._needed = set(_needed(model))
        self._shapes = {name: one.shape for name, one in model.named_parameters()}
        self._shapes |= {name: one.shape for name, one in model.named_buffers()}
        self._missing: set[str] | None = None
        self._not_loaded: set[str] = set()
        _add_placeholders(model)
        self._unexpected: set[str] = set()
        setattr(model, _REPORT_METHOD, self._receive)

    def _receive(self, report: Any):
        """Take the report on its way through the model"""
        # before the model strikes out names that it can do without
        self._missing = set(report.missing_keys)
        self._pass_on(report)
        self._not_loaded = set(report.missing_keys)
        self._unexpected = set(report.unexpected_keys)

    def finish(self):
        """
        Check the tensors after they are loaded.

        :raises ValueError: if a tensor is missing, unexpected, or of another shape, or if a
            scale is not positive and finite
        """
        delattr(self._model, _REPORT_METHOD)
        _remove_placeholders(self._model)
        if self._missing is None:
            raise NotImplementedError(
                f"Transformers {transformers.__version__} loaded the model without a report, "
                "so that missing tensors would go unnoticed: load CAT checkpoints with a "
                "version that this release of cat-modifier supports"
            )
        loaded = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        missing = self._needed & self._missing
        # a model of another class may have parts that the checkpoint lacks, but no incomplete
        # layers
        is_saved_class = type(self._model).__name__ in (self._model.config.architectures or ())
        stored = {layer_of(name) for name in self._shapes.keys() - self._not_loaded}
        missing |= {
            name
            for name in self._not_loaded
            if is_saved_class or (layer_of(name) and layer_of(name) in stored)
        }
        problems = [f"{name} is missing" for name in sorted(missing)]
        problems += [
            f"{name} has shape {tuple(loaded[name].shape)}, not {tuple(shape)}"
            + ("" if name in self._needed else " (another `num_labels` or vocabulary?)")
            for name, shape in sorted(self._shapes.items())
            if name in loaded and loaded[name].shape != shape
        ]
        problems += [
            f"{name} holds values that are not positive and finite"
            for name in sorted(self._needed - missing)
            if name.endswith("_scale") and not _is_scale(loaded[name])
        ]
        problems += [
            f"{name} belongs to no transform of the config"
            for name in sorted(self._unexpected)
            if f".{TRANSFORM_NAME}." in f".{name}"
        ]
        owners = {name.rpartition(".")[0] for name in self._needed}
        problems += [
            f"{name} has no place in the model"
            for name in sorted(self._unexpected)
            if name.rpartition(".")[0] in owners
        ]
        if problems:
            raise ValueError(
                "The tensors of this checkpoint do not fit the model and its "
                "quantization_config: it is damaged, or incomplete. Copy or download it "
                "again:\n" + "\n".join(problems)
            )


def check_files(files: Iterable[str]):
    """
    :param files: safetensors files of a checkpoint
    :raises ValueError: if one cannot be read
    """
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or incomplete ({error}): copy or download it again"
            ) from error


def _is_scale(scale: torch.Tensor) -> bool:
    """Whether values are finite and positive. Those of 8 bits can round to zero"""
    if scale.is_meta or not scale.is_floating_point():
        return True
    values = scale.float()
    is_positive = values >= 0 if scale.itemsize == 1 else values > 0
    return bool((torch.isfinite(values) & is_positive).all())


def _add_placeholders(model: PreTrainedModel):
    """
    Give compressed Linears a weight without values until the tensors are loaded.

    Some models read the weights of their Linears when they initialize what was not loaded.
    """
    for linear in _compressed_linears(model):
        weight = torch.empty(linear.out_features, linear.in_features, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        vars(linear)["weight"] = weight


def _remove_placeholders(model: PreTrainedModel):
    for linear in _compressed_linears(model):
        vars(linear).pop("weight", None)


def _compressed_linears(model: PreTrainedModel) -> list[Linear]:
    return [
        module
        for module in model.modules()
        if isinstance(module, Linear) and "weight" not in module._parameters
    ]


def _needed(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    List the tensors of all transforms, of Linears that are quantized or transformed, and of
    experts, quantized or not.
    """
    modules = dict(model.named_modules())
    transforms = {name for name, part in modules.items() if isinstance(part, CATTransform)}
    names = transforms | _expert_linears(modules)
    names |= {target for name in transforms for target in modules[name].args.targets}
    names |= {
        name
        for name, part in modules.items()
        if isinstance(part, Linear) and is_module_quantized(part)
    }
    tensors = {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in (
            *modules[name]._parameters.items(),
            *modules[name]._buffers.items(),
        )
        if tensor is not None
    }
    tensors |= {
        name: parameter
        for name, parameter in model.named_parameters()
        # experts of an unknown kind, for which quantized models have no loader
        if parameter.ndim == 3 and len(parameter) > 1 and "expert" in name
    }
    # a tied weight is stored once, under another name
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _expert_linears(modules: dict[str, Module]) -> set[str]:
    return {
        f"{name}.{linear}"
        for name, experts in modules.items()
        if isinstance(experts, LinearExperts)
        for linear, part in experts.named_modules()
        if isinstance(part, Linear)
    }
