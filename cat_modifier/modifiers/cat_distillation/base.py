# SPDX-License-Identifier: Apache-2.0
"""CATDistillationModifier: trains all transforms of CATModifier together, on the logits."""

from contextlib import suppress
from typing import Any

import torch
import tqdm
from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State
from llmcompressor.modeling.moe import context
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from loguru import logger
from pydantic import Field
from torch.nn import Module

from cat_modifier.calibration.padding import predicted_tokens
from cat_modifier.functional.alignment import condition_number
from cat_modifier.integrations.transformers.saving import changing
from cat_modifier.modifiers.cat_distillation.fit import Distillation
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
from cat_modifier.modifiers.cat_training.layer import TrainableLayer
from cat_modifier.modifiers.decoding_layers import find_decoding_layers
from cat_modifier.modifiers.forward import unquantized

__all__ = ["CATDistillationModifier"]

_HELD_OUT = 8
"""One of this many batches is held out for early stopping"""


class CATDistillationModifier(Modifier):
    """
    Trains the transforms of a CATModifier, so that the quantized model predicts what the
    original model predicts.

    Gradient descent fits corrections of the transforms of all layers together. The loss is
    the Kullback-Leibler divergence of the next tokens of the two models. Transforms keep
    their sizes, so that serving costs the same. Inverses of the corrections are fused into
    the weights.

    CATTrainingModifier trains layer by layer instead, for models that do not fit in memory.
    Put CATDistillationModifier between CATModifier and a QuantizationModifier or
    GPTQModifier. It trains for the scheme of the latter.

    Sample yaml:
    ```yaml
    quant_stage:
      quant_modifiers:
        CATModifier:
          transform_block_size: 128
        CATDistillationModifier:
          steps: 100
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
    - on_calibration_end
        - check that the schemes are supported
        - train the transforms of all decoding layers, and write them

    Quantized Linears outside of decoding layers, such as an lm_head, compute unquantized in
    training. Memory beside the model: the weights of the decoding layers twice in its dtype,
    the activations of one batch in one layer, and a few times the logits of one batch.

    :param steps: upper bound of the steps of gradient descent
    :param batch_size: batches of the calibration data per step
    :param learning_rate: learning rate of Adam; grows in the first steps, and decays to 0
        along a cosine
    :param patience: number of evaluations without progress before training stops. An eighth
        of the batches is held out, and their divergence is evaluated at most ten times. The
        transforms of least divergence are kept: those of CATModifier if no step is better
    """

    # training passes the data through the model itself, several times
    requires_calibration_data: bool = False

    steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=0.001, gt=0, allow_inf_nan=False)
    patience: int = Field(default=3, ge=1)

    def on_initialize(self, state: State, **kwargs) -> bool:
        """
        Check the data and the recipe.

        :raises ValueError: if there are less than two batches of data, no preceding
            CATModifier, or more than one rank
        """
        check_recipe(self, state)
        data: Any = state.data.calib
        with suppress(TypeError):  # of data without a length
            check_count(len(data), self)
        return True

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        """
        Train the transforms, and write them.

        :raises ValueError: if the recipe's schemes are not supported, no transform is inside
            a decoding layer, there are less than two batches with real tokens, the model
            returns no logits, or they are not finite
        """
        model = state.model
        config = find_config(model, self)
        inputs = find_inputs(model, config)
        layers = []
        found = find_decoding_layers(model)
        for name, layer in found.items():
            is_inside_another = any(name.startswith(f"{other}.") for other in found)
            own = [one for one in inputs if one.first.startswith(f"{name}.")]
            if own and not is_inside_another:
                layers.append(TrainableLayer(layer, name, own))
        if not any(one.correction_shape for layer in layers for one in layer.inputs):
            raise ValueError(
                "CATDistillationModifier trains transforms inside decoding layers. "
                f"{type(model).__name__} has none of them: leave CATDistillationModifier out "
                "of the recipe"
            )
        check_inputs([one for layer in layers for one in layer.inputs], self)
        batches = [one for one in state.data.calib or () if _has_tokens(model, one)]
        check_count(len(batches), self)
        count = max(1, len(batches) // _HELD_OUT)
        with (
            HooksMixin.disable_hooks(),
            unquantized(model),
            # only those that a token is routed to
            patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False),
            tqdm.tqdm(total=self.steps, desc="Training all transforms") as progress,
            torch.enable_grad(),
            without_gradients(model),
        ):
            training = Distillation(model, layers, batches[:-count], batches[-count:]).fit(
                self.steps,
                self.batch_size,
                self.learning_rate,
                self.patience,
                progress.update,
            )
        condition = max(condition_number(one) for one in training.corrections.values())
        logger.info(
            f"Divergence from the original model on held-out batches {training.before:.4f} -> "
            f"{training.after:.4f} nats per token in {training.steps} steps, condition number "
            f"of the corrections {condition:.1f}"
        )
        if training.after < training.before:
            with changing(model):
                store_in_floats(model, config)
                for trainable in layers:
                    insert(trainable, training.corrections)
                    trainable.release()
        else:
            logger.warning(
                "No step was better than the transforms of CATModifier, which are kept: try "
                "another `learning_rate`, or more data"
            )


def _has_tokens(model: Module, batch: dict[str, Any]) -> bool:
    """Whether a batch has more than padding"""
    mask = predicted_tokens(model, batch)
    return mask is None or bool(mask.any())
