# SPDX-License-Identifier: Apache-2.0
"""CATTrainingModifier: trains the transforms that CATModifier has inserted."""

from typing import Any

import torch
import tqdm
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn import Module

from cat_modifier.calibration.attention import without_caches
from cat_modifier.calibration.padding import padding_mask
from cat_modifier.functional.alignment import condition_number
from cat_modifier.integrations.transformers.saving import changing
from cat_modifier.modifiers.cat_training.fit import Sample, call_layer, fit
from cat_modifier.modifiers.cat_training.inputs import (
    check_count,
    check_inputs,
    check_recipe,
    find_config,
    find_inputs,
)
from cat_modifier.modifiers.cat_training.insert import (
    insert,
    store_in_floats,
    without_gradients,
)
from cat_modifier.modifiers.cat_training.layer import LayerInput, TrainableLayer
from cat_modifier.modifiers.cat_training.resume import CorrectionStore
from cat_modifier.modifiers.decoding_layers import find_decoding_layers

__all__ = ["CATTrainingModifier"]

_HELD_OUT = 8
"""One of this many samples is held out for early stopping"""


class CATTrainingModifier(Modifier):
    """
    Trains the transforms of a CATModifier, the trained variant of CAT (arXiv 2603.04359).

    Gradient descent fits corrections of the transforms, layer by layer. The input of a layer
    is the output of the quantized layers before it; the layer learns to return the output of
    the original layer. Transforms keep their sizes, so that serving costs the same. Inverses
    of the corrections are fused into the weights.

    Put CATTrainingModifier between CATModifier and a QuantizationModifier or GPTQModifier. It
    trains for the scheme of the latter.

    Sample yaml:
    ```yaml
    quant_stage:
      quant_modifiers:
        CATModifier:
          transform_block_size: 128
        CATTrainingModifier:
          steps: 120
        QuantizationModifier:
          ignore: [lm_head]
          config_groups:
            group_0:
              targets: [Linear]
              format: pack-quantized
              weights: {num_bits: 4, type: int, strategy: channel, observer: memoryless_mse}
              input_activations:
                {num_bits: 4, type: int, strategy: token, symmetric: false, dynamic: true}
    ```

    Lifecycle:

    - on_initialize
        - check that a CATModifier precedes this modifier
    - on_calibration_start
        - check that the schemes are supported
        - hook the decoding layers, to capture the arguments of their calls
    - on_sequential_epoch_end
        - train the transforms of each decoding layer of the subgraph, write them, and compute
          the output of the quantized layer
    - on_calibration_end
        - remove hooks; raise if a layer could not be trained

    The device that computes holds the inputs and outputs of one layer for all calibration
    data, and a few float32 copies of the layer's weights.

    :param steps: upper bound of the steps of gradient descent per layer
    :param batch_size: batches of the calibration data per step
    :param learning_rate: learning rate of Adam at the start; decays to 0 along a cosine
    :param patience: number of evaluations without progress before training of a layer stops.
        An eighth of the samples is held out, and its error is evaluated at most ten times.
        The transforms of least error are kept: those of CATModifier if no step is better
    :param checkpoint_dir: folder for the corrections of each trained layer; None to write
        none. A repeated run reads the layers found there instead of training them. The data
        must come in the same order: pass `shuffle_calibration_samples=False` to oneshot
    """

    requires_calibration_data: bool = True

    steps: int = Field(default=120, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=0.003, gt=0, allow_inf_nan=False)
    patience: int = Field(default=3, ge=1)
    checkpoint_dir: str | None = None

    _inputs: dict[str, list[LayerInput]] = PrivateAttr(default_factory=dict)
    _names: dict[Module, str] = PrivateAttr(default_factory=dict)
    _calls: dict[str, list[tuple[tuple, dict[str, Any]]]] = PrivateAttr(default_factory=dict)
    _hidden: list[Tensor] | None = PrivateAttr(default=None)
    _expected: Tensor | None = PrivateAttr(default=None)
    _trained: set[str] = PrivateAttr(default_factory=set)
    _store: CorrectionStore | None = PrivateAttr(default=None)

    ## Lifecycle ##

    def on_initialize(self, state: State, **kwargs) -> bool:
        """
        Check the data and the recipe.

        :raises ValueError: if there is no data, no preceding CATModifier, or more than one
            rank
        """
        check_recipe(self, state)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        """
        Find the decoding layers to train, and hook them.

        :raises ValueError: if the recipe's schemes are not supported, or no transform is
            inside a decoding layer
        """
        config = find_config(state.model, self)
        if self.checkpoint_dir is not None:
            settings = self.model_dump(
                include={"steps", "batch_size", "learning_rate", "patience"}
            )
            self._store = CorrectionStore(self.checkpoint_dir, settings)
        with changing(state.model):
            store_in_floats(state.model, config)
        inputs = find_inputs(state.model, config)
        layers = find_decoding_layers(state.model)
        self._inputs = {
            name: [one for one in inputs if one.first.startswith(f"{name}.")] for name in layers
        }
        # all layers of these classes, to hand outputs from layer to layer. The layers of a
        # vision tower have other classes
        classes = {
            type(layers[name])
            for name, own in self._inputs.items()
            if any(one.correction_shape is not None for one in own)
        }
        self._names = {layer: name for name, layer in layers.items() if type(layer) in classes}
        if not self._names:
            found = sorted({type(layer).__name__ for layer in layers.values()})
            raise ValueError(
                "CATTrainingModifier trains transforms inside decoding layers. "
                f"{type(state.model).__name__} has none of them (classes of decoding layers: "
                f"{', '.join(found) or 'none'}): leave CATTrainingModifier out of the recipe"
            )
        check_inputs([one for name in self._names.values() for one in self._inputs[name]], self)

        def capture(layer: Module, args: tuple, kwargs: dict[str, Any]):
            call = without_caches(args, kwargs)
            self._calls.setdefault(self._names[layer], []).append(call)

        # Any: its type hint allows hooks of one argument only
        register: Any = self.register_hook
        for layer in self._names:
            register(layer, capture, "forward_pre", with_kwargs=True)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[Module], **kwargs
    ):
        for layer, name in self._names.items():
            if layer in modules and name in self._calls:
                with HooksMixin.disable_hooks():  # training must not be captured
                    self._train(state.model, layer, name, self._calls.pop(name))
                self._trained.add(name)

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        """
        Remove the hooks, and check that all layers were trained.

        :raises ValueError: if a layer was never called as a whole
        """
        self.remove_hooks()
        left = [name for name in self._names.values() if name not in self._trained]
        in_parts = [name for name in left if name not in self._calls]
        is_trained = bool(self._trained)
        self._inputs, self._names, self._calls, self._trained = {}, {}, {}, set()
        self._hidden = self._expected = self._store = None
        if left and not is_trained:
            raise ValueError(
                f"{left[0]} was never called as a whole, so that its transforms were not "
                "trained: leave `sequential_targets` of oneshot at its default"
                if in_parts
                else f"{left[0]} runs in code that llm-compressor does not divide into layers, "
                "so that its transforms cannot be trained: leave CATTrainingModifier out"
            )
        if left:
            logger.warning(
                f"{len(left)} layers were not trained and keep the transforms of CATModifier, "
                "because they are called in parts, or in code that llm-compressor does not "
                f"divide into layers: {', '.join(left)}"
            )

    ## Training ##

    def _train(
        self,
        model: Module,
        layer: Module,
        name: str,
        calls: list[tuple[tuple, dict[str, Any]]],
    ):
        check_count(len(calls), self)
        samples = self._make_samples(layer, name, calls)
        trainable = TrainableLayer(layer, name, self._inputs[name])
        unchanged = trainable.identity()
        corrections = self._load_or_fit(trainable, samples) if unchanged else {}
        if any(not torch.equal(corrections[name], unchanged[name]) for name in unchanged):
            with changing(model):
                trainable = insert(trainable, corrections)
        with torch.no_grad():
            tensors = trainable.correct({})
            tensors = trainable.quantize(tensors, trainable.range_ratios(tensors))
            with trainable.computing_with(tensors) as quantized:
                self._hidden = [
                    call_layer(quantized, one).to(one.hidden.dtype) for one in samples
                ]
        self._expected = samples[0].target

    def _load_or_fit(
        self, trainable: TrainableLayer, samples: list[Sample]
    ) -> dict[str, Tensor]:
        if self._store is None:
            return self._fit(trainable, samples)
        targets = [one.target for one in samples]
        corrections = self._store.load(trainable, targets)
        if corrections is None:
            corrections = self._fit(trainable, samples)
            self._store.save(trainable, targets, corrections)
        else:
            logger.info(f"{trainable.name}: trained before, from {self.checkpoint_dir}")
        return corrections

    def _make_samples(
        self, layer: Module, name: str, calls: list[tuple[tuple, dict[str, Any]]]
    ) -> list[Sample]:
        samples = []
        for index, (args, kwargs) in enumerate(calls):
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0 and self._hidden is not None and not self._follows(hidden):
                logger.warning(
                    f"The input of {name} is not the output of the layer before it: {name} is "
                    "trained without the errors of the layers before it"
                )
                self._hidden = None
            mask = padding_mask(kwargs.get("attention_mask"))
            sample = Sample(args, kwargs, hidden, hidden, mask)
            with torch.no_grad():
                sample.target = call_layer(layer, sample)
            if self._hidden is not None:
                sample.hidden = self._hidden[index]
            samples.append(sample)
        return samples

    def _follows(self, hidden: Tensor) -> bool:
        """Whether a layer's input is the output of the layer before, up to 16-bit rounding"""
        expected = self._expected
        if expected is None or hidden.shape != expected.shape:
            return False
        error = (hidden - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
        return error.median().item() < 0.05

    def _fit(self, trainable: TrainableLayer, samples: list[Sample]) -> dict[str, Tensor]:
        """
        Train the corrections of a layer.

        :raises ValueError: if the error of the layer is not finite
        """
        samples = [one for one in samples if one.mask is None or one.mask.any()]
        check_count(len(samples), self)
        count = max(1, len(samples) // _HELD_OUT)
        with (
            tqdm.tqdm(total=self.steps, desc=f"Training {trainable.name}") as progress,
            torch.enable_grad(),
            without_gradients(trainable.layer),
        ):
            training = fit(
                trainable,
                samples[:-count],
                samples[-count:],
                self.steps,
                self.batch_size,
                self.learning_rate,
                self.patience,
                progress.update,
            )
        condition = max(condition_number(one) for one in training.corrections.values())
        logger.info(
            f"{trainable.name}: error on held-out samples {training.before:.5f} -> "
            f"{training.after:.5f} of the output in {training.steps} steps, condition number "
            f"of the corrections {condition:.1f}"
        )
        return training.corrections
