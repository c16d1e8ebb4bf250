# SPDX-License-Identifier: Apache-2.0
"""Corrections of trained layers on disk, to resume training after an interruption."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cat_modifier.modifiers.cat_training.layer import TrainableLayer

__all__ = ["CorrectionStore"]

_ARGUMENTS = {
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "dynamic",
    "scale_dtype",
    "observer",
    "observer_kwargs",
}
"""Quantization arguments that training depends on. GPTQ and rounding share them"""

_TOLERANCE = 0.01
"""Bound of the relative difference between two runs on the same data and model: of transforms
in closed form, and of the log norms of tokens"""


class CorrectionStore:
    """
    A folder with a file for each trained layer.

    :param folder: folder; created if it does not exist
    :param settings: settings of the training, values that JSON can hold
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]):
        self.folder, self.settings = Path(folder), settings
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, layer: TrainableLayer) -> Path:
        return self.folder / f"{layer.name}.safetensors"

    def _describe(self, layer: TrainableLayer) -> str:
        schemes = {}
        for linears in (one.linears for one in layer.inputs):
            for name, linear in linears.items():
                scheme: Any = linear.quantization_scheme
                schemes[name] = [
                    args and args.model_dump(mode="json", include=_ARGUMENTS)
                    for args in (scheme.weights, scheme.input_activations)
                ]
        transforms = {
            one.first: one.transform.scheme.model_dump(mode="json", exclude={"apply"})
            for one in layer.inputs
            if one.transform is not None
        }
        description = {"schemes": schemes, "transforms": transforms}
        return json.dumps(self.settings | description, sort_keys=True)

    def save(
        self, layer: TrainableLayer, targets: list[Tensor], corrections: dict[str, Tensor]
    ):
        """
        Write the corrections of a layer.

        :param targets: outputs of the original layer, each of shape (batch, tokens, d). They
            identify the calibration data
        """
        tensors = {f"correction.{name}": one for name, one in corrections.items()}
        tensors |= {f"before.{name}": one for name, one in layer.base.blocks.items()}
        tensors["tokens"] = _sizes(targets)
        tensors = {name: one.detach().float().cpu() for name, one in tensors.items()}
        part = self._path(layer).with_suffix(".part")
        try:
            part.write_bytes(save(tensors, {"settings": self._describe(layer)}))
            os.replace(part, self._path(layer))
        finally:
            part.unlink(missing_ok=True)

    def load(self, layer: TrainableLayer, targets: list[Tensor]) -> dict[str, Tensor] | None:
        """
        Read the corrections of a layer.

        :param targets: see :meth:`save`
        :return: corrections by the first Linear of the input; None if there is no file
        :raises ValueError: if the file is damaged, or the layer was trained on another model,
            recipe or calibration data
        """
        path = self._path(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                settings = file.metadata()["settings"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: remove it ({error})") from error
        before = {
            name.removeprefix("before."): one
            for name, one in tensors.items()
            if name.startswith("before.")
        }
        blocks = layer.base.blocks
        is_same = (
            settings == self._describe(layer)
            and before.keys() == blocks.keys()
            and all(_is_close(before[name], blocks[name]) for name in blocks)
            and _is_close(tensors.get("tokens"), _sizes(targets))
        )
        if not is_same:
            raise ValueError(
                f"{path} was made with another model, recipe or calibration data: choose "
                "another `checkpoint_dir`, or remove this one. (oneshot shuffles the data anew "
                "in each run: pass `shuffle_calibration_samples=False`)"
            )
        device = layer.base.weights[layer.inputs[0].first].device
        return {
            name.removeprefix("correction."): one.to(device)
            for name, one in tensors.items()
            if name.startswith("correction.")
        }


def _sizes(targets: list[Tensor]) -> Tensor:
    """Compute the log norm of each token. Logarithms, because a few tokens can be huge"""
    norms = [one.float().norm(dim=-1).flatten() for one in targets]
    return torch.cat(norms).clamp_min(torch.finfo(torch.float32).tiny).log()


def _is_close(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a.shape != b.shape:
        return False
    b = b.to(a)
    return bool((a - b).norm() <= _TOLERANCE * b.norm())
