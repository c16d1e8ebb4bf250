# SPDX-License-Identifier: Apache-2.0
"""Corrections of trained layers on disk, so that training can go on after an interruption"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cat_modifier.training.layer import TrainableLayer

__all__ = ["CorrectionStore"]

_ARGUMENTS = {"num_bits", "symmetric", "strategy", "group_size", "observer"}
"""Those of quantization which training depends on: the same for GPTQ and for rounding"""

_TOLERANCE = 0.01
"""Relative difference between transforms in closed form of the same data and model"""


class CorrectionStore:
    """
    A folder with a file for each layer.

    :param folder: is made if it does not exist
    :param settings: of the training, for JSON
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
                scheme = linear.quantization_scheme
                schemes[name] = [
                    args and args.model_dump(mode="json", include=_ARGUMENTS)
                    for args in (scheme.weights, scheme.input_activations)
                ]
        return json.dumps(self.settings | {"schemes": schemes}, sort_keys=True)

    def save(self, layer: TrainableLayer, corrections: dict[str, Tensor]):
        tensors = {f"correction.{name}": one for name, one in corrections.items()}
        tensors |= {f"before.{name}": one for name, one in layer.base.blocks.items()}
        tensors = {name: one.detach().float().cpu() for name, one in tensors.items()}
        part = self._path(layer).with_suffix(".part")
        try:
            part.write_bytes(save(tensors, {"settings": self._describe(layer)}))
            os.replace(part, self._path(layer))
        finally:
            part.unlink(missing_ok=True)

    def load(self, layer: TrainableLayer) -> dict[str, Tensor] | None:
        """
        :return: corrections by the owner of the input; None if the layer is not there
        :raises ValueError: if what is there is damaged, or was trained otherwise
        """
        path = self._path(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                settings = file.metadata()["settings"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: remove it ({error})") from error
        before = {
            name.removeprefix("before."): one
            for name, one in tensors.items()
            if name.startswith("before.")
        }
        blocks = layer.base.blocks
        is_same = settings == self._describe(layer) and before.keys() == blocks.keys()
        if not is_same or not all(_is_close(before[name], blocks[name]) for name in blocks):
            raise ValueError(
                f"{path} is of another model, recipe or calibration data: choose another "
                "`checkpoint_dir`, or remove this one"
            )
        device = layer.base.weights[layer.inputs[0].owner].device
        return {
            name.removeprefix("correction."): one.to(device)
            for name, one in tensors.items()
            if name.startswith("correction.")
        }


def _is_close(a: Tensor, b: Tensor) -> bool:
    b = b.to(a)
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())
