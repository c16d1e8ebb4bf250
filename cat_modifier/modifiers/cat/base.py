# SPDX-License-Identifier: Apache-2.0
"""CATModifier, which inserts concentration-alignment transforms into a model"""

import math
from collections import defaultdict
from collections.abc import Sized
from itertools import islice
from typing import Literal

import torch
import tqdm
from compressed_tensors import TRANSFORM_CONFIG_NAME, CompressionFormat
from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import OffloadCache
from compressed_tensors.utils import (
    TorchDtype,
    get_execution_device,
    update_offload_parameter,
)
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils import untie_word_embeddings
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from cat_modifier.calibration.attention import ValueProjection, find_value_projections
from cat_modifier.calibration.shared_inputs import DEFAULT_IGNORE, SharedInput
from cat_modifier.calibration.collector import InputCollector
from cat_modifier.calibration.second_moments import InputStatistics
from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.checkpoint.integers import suits_int8_product
from cat_modifier.integrations.transformers.saving import save_atomically
from cat_modifier.checkpoint.transform_module import CATTransform
from cat_modifier.modifiers.cat.plan import Candidates, choose_layouts
from cat_modifier.modifiers.cat.clipping_old import choose_clip_ratio
from cat_modifier.modifiers.decoding_layers import find_decoding_layers
from cat_modifier.modifiers.cat.matching import match_linears, match_mappings
from cat_modifier.modifiers.cat.calibration_pass import is_resident, pass_over_data
from cat_modifier.modifiers.cat.distributed import barrier, of_all_ranks
from cat_modifier.modifiers.cat.validation import (
    check_different_groups,
    check_later_transforms,
    check_quantized,
    check_shared_pass,
    check_transformed,
    warn_of_what_cannot_be_served,
)
from cat_modifier.modifiers.cat.log import GroupReport, predicted_noise
from cat_modifier.modifiers.cat.sharding import may_be_sharded
from cat_modifier.modifiers.cat.apply import fold_into_values, read_weights
from cat_modifier.functional.layout import (
    TransformLayout,
    cheaper_layouts,
    choose_layout,
    choose_attention_layout,
)
from cat_modifier.functional.transform import FusedTransform, compute_transform
from cat_modifier.functional.alignment import DEFAULT_DAMPENING_FRAC, inner_blocks
from cat_modifier.functional.layout import Rotation

__all__ = ["CATModifier"]

_SAMPLE_SIZE = 64
"""Tokens of each input that are kept, to clip ranges and predict noise by"""


class CATModifier(Modifier):
    """
    Inserts concentration-alignment transforms (CAT, arXiv 2603.04359) in front of Linears,
    so that weights and activations lose less to quantization at low bit widths.

    For each group of Linears which read the same input, the block-diagonal transform ``T``
    of best alignment is computed in closed form from the second moments of the input and
    of the weights, and followed by a Hadamard rotation for concentration. Its inverse goes
    into the weights; ``T`` itself is applied to the activations at run time. The function
    of the model does not change; activations are clipped as part of their quantization. Put
    a QuantizationModifier or GPTQModifier after it.

    Sample yaml:
    ```yaml
    quant_stage:
      quant_modifiers:
        CATModifier:
          block_size: 128
          rotation: hadamard
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
        - find the targeted Linears
    - on_calibration_start
        - refuse to share the calibration pass with another modifier
        - pass one batch through the model, to find the values which attention mixes
        - hook the Linears: group them by input, accumulate moments
        - if the whole model is on the device that computes, pass the data through it, once:
          transforms leave no error to propagate, for which the sequential pipeline would
          run each layer twice. Otherwise that pipeline moves the model, layer by layer.
          Its statistics of all layers are then held at once
    - on_sequential_epoch_end
        - with a `budget`: choose block sizes, by the noise that is predicted for each
        - for each complete group: compute T, transform the weights, attach T
    - on_calibration_end
        - the same for groups that are left, and for Linears which saw no tokens
    - on_finalize
        - make `save_pretrained` write a marked checkpoint, atomically

    :param block_size: k, number of input channels that a block of T mixes. An upper bound:
        if it does not divide the input size of a Linear, the largest usable divisor below
        it is taken. 1 scales channels; "full" is one block over the whole input, which
        needs memory and run time in the square of the input size
    :param rotation: what follows the blocks. `"hadamard"` mixes the whole input at run
        time; `"block-hadamard"` and `"eigen-hadamard"` mix the channels of a block and cost
        nothing at run time; `"none"` leaves the blocks alone
    :param strength: exponent of the alignment transform: 1 is optimal for uniform rounding
        noise (integers), 0 leaves the rotation alone. Finite and not negative
    :param dampening_frac: what is added to the diagonal of each block of second moments, relative
        to its mean eigenvalue; positive
    :param targets: Linears to transform, by name, class or `re:` pattern
    :param ignore: exceptions from `targets`. By default the head and vision towers
    :param mappings: groups of Linears that share a transform, as lists of patterns, one
        list a group, e.g. `[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]]`. Linears of no
        mapping are grouped by observing which of them read the same input
    :param fuse_attention: put the blocks in front of the output projection of attention, of
        which each is then a head, into the Linear that makes the values. Of them nothing is
        left to do at run time but the Hadamard product of `rotation: hadamard`. Where
        attention is seen to do anything but mix values, and with `block_size: full`, that
        input is treated as all others. LoRA adapters of the original model for these two
        Linears do not fit the new one
    :param clip_activations: make the range of each token smaller than its values, by a ratio
        for each input that is least in error on a sample. Of activations which are asymmetric
        integers with a dynamic scale for each token; others are left alone
    :param precision: dtype in which T is stored. The inverse is taken of the stored T
    :param budget: share of multiply-adds which the transforms of a decoding layer may add at
        run time to those of its Linears that they transform, for the tokens of the
        calibration (of experts, pass `moe_calibrate_all_experts=False` to oneshot). Blocks, of
        at most `block_size`, are then of several sizes: larger where predicted noise goes down
        most for what they cost. None makes them as large as they can be, as they are outside
        of decoding layers
    :param tensor_parallel_size: largest tensor parallel size at which the checkpoint can be
        served: blocks and Hadamard products then stay within one of as many shards of those
        inputs that may be sharded (o_proj, down_proj, and all whose Linears are not
        `colwise` in the model's `tp_plan`)
    """

    requires_calibration_data: bool = True

    block_size: int | Literal["full"] = 128
    rotation: Literal["hadamard", "block-hadamard", "eigen-hadamard", "none"] = "hadamard"
    strength: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    dampening_frac: float = Field(default=DEFAULT_DAMPENING_FRAC, gt=0.0, allow_inf_nan=False)
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: str | list[str] = Field(default_factory=lambda: list(DEFAULT_IGNORE))
    mappings: list[list[str]] | None = None
    fuse_attention: bool = True
    clip_activations: bool = True
    precision: TorchDtype = Field(default=torch.bfloat16)
    budget: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    tensor_parallel_size: int = Field(default=1, ge=1)

    _linears: dict[str, Linear] = PrivateAttr(default_factory=dict)
    _value_heads: dict[str, ValueProjection] = PrivateAttr(default_factory=dict)
    _calibration: InputCollector | None = PrivateAttr(default=None)
    _finished: set[Module] = PrivateAttr(default_factory=set)
    _transformed: set[str] = PrivateAttr(default_factory=set)
    _layers: dict[str, Module] = PrivateAttr(default_factory=dict)
    _counts: dict[str, int] = PrivateAttr(default_factory=dict)
    _budgeted: set[str] = PrivateAttr(default_factory=set)
    _config: CATTransformConfig | None = PrivateAttr(default=None)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _wrap_singleton(cls, value):
        return [value] if isinstance(value, str) else value

    @field_validator("block_size")
    @classmethod
    def _validate_block_size(cls, value: int | str) -> int | str:
        if value != "full" and value < 1:
            raise ValueError(f"`block_size` must be a positive integer or 'full', got {value}")
        return value

    @field_validator("precision")
    @classmethod
    def _validate_precision(cls, value: torch.dtype) -> torch.dtype:
        if value not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"`precision` must be bfloat16, float16 or float32, got {value}")
        return value

    ## Lifecycle ##

    def on_initialize(self, state: State, **kwargs) -> bool:
        """
        :raises ValueError: if there is nothing to transform or to calibrate on, if a target
            cannot be transformed, if a later modifier would undo it, or if there is a budget
            for decoding layers, and none of them
        """
        data = state.data.calib
        if data is None:
            raise ValueError("CATModifier needs calibration data: pass a `dataset` to oneshot")
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError("The calibration dataset is empty")
        matched = match_linears(state.model, self.targets, self.ignore)
        check_later_transforms(self)
        if self.budget is not None:
            self._layers = find_decoding_layers(state.model)
        self.requires_calibration_data = not self._can_calibrate_at_once(state.model, matched)
        self._linears = matched
        self._config = CATTransformConfig(config_groups={})
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        """
        :raises ValueError: if another modifier shares the calibration pass, if an input has
            a transform, or if weights are quantized already
        """
        check_shared_pass(self)
        check_transformed(self._linears)
        check_quantized(self._linears, self)
        warn_of_what_cannot_be_served(self._linears)
        # the weight of a head which is tied to the embedding cannot change alone
        if state.model.get_output_embeddings() in self._linears.values():
            untie_word_embeddings(state.model)

        if self.fuse_attention and self.block_size != "full":
            # one and the same: by default, oneshot shuffles the data anew for each pass
            batches = list(islice(state.data.calib, 1))
            found = find_value_projections(
                state.model, self._linears, lambda: pass_over_data(state, batches)
            )
            everywhere = of_all_ranks(found)
            self._value_heads = {
                name: heads
                for name, heads in found.items()
                if all(ranks.get(name) == heads for ranks in everywhere)
            }
        self._calibration = InputCollector(
            self._linears,
            lambda group: InputStatistics(
                group.in_features, self._geometry(group).block_size, _SAMPLE_SIZE
            ),
        )
        if self.mappings is not None:
            self._calibration.observer.set_groups(
                match_mappings(state.model, self.mappings, self.ignore, self._linears)
            )

        names = {linear: name for name, linear in self._linears.items()}

        def input_hook(linear: Linear, args: tuple):
            self._calibration.observe(names[linear], args[0], state.current_batch_idx)

        def mask_hook(module: Module, args: tuple, kwargs: dict):
            self._calibration.set_attention_mask(
                state.current_batch_idx, kwargs.get("attention_mask")
            )

        for module in state.model.modules():
            if module in names:
                self.register_hook(module, input_hook, "forward_pre")
            elif any(child in names for child in module.modules()):
                self.register_hook(module, mask_hook, "forward_pre", with_kwargs=True)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[Module], **kwargs
    ):
        self._finished.update(modules)
        is_without_data = (
            not self.requires_calibration_data
            and self._finished.issuperset(self._linears.values())
            and not self._calibration.pending_groups()
            and not self._transformed
        )
        if is_without_data:  # llm-compressor's pipeline passes none, as it was told
            pass_over_data(state)
            self.remove_hooks()
        groups = [
            group
            for group in self._calibration.pending_groups()
            if self._finished.issuperset(group.linears.values())
        ]
        self._transform_groups(groups, set(modules))

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        """
        :raises ValueError: if no Linear saw any tokens
        """
        self.remove_hooks()
        self._transform_groups(self._calibration.pending_groups())
        if not self._transformed:
            raise ValueError(
                "CATModifier saw no tokens: pass a calibration `dataset` of more than padding"
            )
        self._rotate_unseen()
        setattr(state.model, TRANSFORM_CONFIG_NAME, self._config)
        self._calibration = None

    def on_finalize(self, state: State, **kwargs) -> bool:
        for linear in self._linears.values():
            scheme = getattr(linear, "quantization_scheme", None)
            # by default compressed-tensors stores integers in 8 bits if activations are
            # integers too
            if (
                scheme is not None
                and scheme.format is None
                and suits_int8_product(scheme.weights, scheme.input_activations)
                and scheme.weights.num_bits < 8
            ):
                scheme.format = CompressionFormat.pack_quantized
        save_atomically(state.model)
        return True

    ## Calibration ##

    def _can_calibrate_at_once(self, model: Module, linears: dict[str, Linear]) -> bool:
        """
        Whether the model is on the device, and the moments of all inputs, counted once for
        each Linear, are smaller than it
        """
        k = math.inf if self.block_size == "full" else self.block_size
        moments = sum(4 * d * min(k, d) for d in (one.in_features for one in linears.values()))
        with OffloadCache.disable_onloading():  # onloading would make copies
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            answer = is_resident(model) and moments < size
        return all(of_all_ranks(answer))  # they take the same way

    ## Transformation ##

    def _shards(self, group: SharedInput) -> int:
        is_sharded = self.tensor_parallel_size > 1 and may_be_sharded(
            active_session().state.model, group.linears
        )
        return self.tensor_parallel_size if is_sharded else 1

    def _geometry(self, group: SharedInput) -> TransformLayout:
        """The largest"""
        shards = self._shards(group)
        if heads := self._find_value_heads(group):
            return choose_attention_layout(
                group.first, group.in_features, shards, heads.head_dim, Rotation(self.rotation)
            )
        return choose_layout(
            group.first,
            group.in_features,
            shards,
            self.block_size,
            Rotation(self.rotation),
        )

    def _find_value_heads(self, group: SharedInput) -> ValueProjection | None:
        found = (self._value_heads.get(name) for name in group.linears)
        return next((heads for heads in found if heads is not None), None)

    def _transform_groups(self, groups: list[SharedInput], modules: set[Module] | None = None):
        """
        :param modules: whose outputs are computed anew; None for all
        """
        check_different_groups(groups)
        is_quiet = not groups or not is_source_process()
        # what goes into the Linears of other groups comes first: they are transformed as they
        # will be
        heads = [group for group in groups if self._find_value_heads(group)]
        others = [group for group in groups if group not in heads]
        progress = tqdm.tqdm(total=len(groups), desc="Transforming", disable=is_quiet)
        layouts = {group.first: self._geometry(group) for group in groups}
        for group in heads:
            self._reduce(group)
            self._transform_pending_group(group, layouts[group.first], modules)
            progress.update()
        if self.budget is not None:
            for group in others:
                self._reduce(group)
            layouts |= self._choose_geometries(heads, others, modules)
        for group in others:
            if self.budget is None:
                self._reduce(group)
            self._transform_pending_group(group, layouts[group.first], modules)
            progress.update()
        progress.close()

    def _reduce(self, group: SharedInput):
        device = get_execution_device(group.linears[group.first])
        self._calibration.statistics(group).moments.reduce(device)

    def _transform_pending_group(
        self, group: SharedInput, layout: TransformLayout, modules: set[Module] | None
    ):
        statistics = self._calibration.take(group)
        self._counts[group.first] = statistics.moments.count
        # if every token was padding, the group is left to be treated as unseen
        if statistics.moments.count:
            self._transform_group(group, layout, statistics, modules)

    ## Budget ##

    def _choose_geometries(
        self, heads: list[SharedInput], others: list[SharedInput], modules: set[Module] | None
    ) -> dict[str, TransformLayout]:
        """
        :param heads: groups which are transformed already
        :param others: which are left
        :return: for those which are in a decoding layer, by the owner
        :raises ValueError: if a part of a layer was transformed before, or if the budget does
            not suffice
        """
        layers: dict[str, list[SharedInput]] = defaultdict(list)
        for group in [*heads, *others]:
            inside = (name for name in self._layers if group.first.startswith(f"{name}."))
            if (layer := next(inside, None)) is not None:
                layers[layer].append(group)
        chosen = {}
        is_quiet = not layers or not is_source_process()
        for layer, members in tqdm.tqdm(
            layers.items(), desc="Choosing block sizes", disable=is_quiet
        ):
            if layer in self._budgeted:
                raise ValueError(
                    f"{layer} is calibrated in parts, which cannot share a `budget`: leave "
                    "`sequential_targets` of oneshot at its default"
                )
            self._budgeted.add(layer)
            candidates = [
                found
                for group in members
                if (found := self._candidates(group, group in heads, modules)) is not None
            ]
            if candidates:
                chosen |= choose_layouts(layer, candidates, self.budget)
        return chosen

    def _candidates(
        self, group: SharedInput, is_done: bool, modules: set[Module] | None
    ) -> Candidates | None:
        """
        :param is_done: whether the group is transformed, so that its cost is given
        :return: None if it saw no tokens
        """
        largest, features = self._geometry(group), group.in_features
        if is_done:
            count = self._counts[group.first]
            is_fused = self._is_folded(self._find_value_heads(group), modules)
            layouts, costs = [largest], [largest.multiply_adds(features, is_fused)]
        else:
            count = self._calibration.statistics(group).moments.count
            layouts = cheaper_layouts(
                group.first, features, self._shards(group), largest, Rotation(self.rotation)
            )
            # what few tokens say of large blocks is true of them alone
            layouts = [one for one in layouts if one.block_size <= count] or layouts
            costs = [one.multiply_adds(features) for one in layouts]
        if not count:
            return None
        noises = [0.0] * len(costs)
        if len(costs) > 1 and self._is_quantized(group):
            noises = self._predict_noises(group, layouts)
        return Candidates(group, count, layouts, costs, noises)

    def _is_quantized(self, group: SharedInput) -> bool:
        """Or may be: a recipe of CATModifier alone says nothing"""

        def has_scheme(linears: dict[str, Linear]) -> bool:
            return any(getattr(one, "quantization_scheme", None) for one in linears.values())

        return has_scheme(group.linears) or not has_scheme(self._linears)

    def _predict_noises(self, group: SharedInput, layouts: list[TransformLayout]) -> list[float]:
        """Noise-to-signal ratio of the outputs for each, predicted. A collective call"""
        statistics = self._calibration.statistics(group)
        sample = statistics.sample
        device = get_execution_device(group.linears[group.first])
        weights = read_weights(group, device)
        noises = []
        for layout in layouts:
            insertion = self._compute_insertion(
                group, layout, statistics, weights, self.precision
            )
            if sample.tokens is not None:
                noise = predicted_noise(
                    group,
                    insertion.transform_tokens(sample.tokens.to(device, torch.float64)),
                    insertion.transform_weights(weights),
                    sample.weights.to(device),
                )
                noises.append(noise)
        # each rank has a sample of its own
        of_ranks = [rank for rank in of_all_ranks((sample.count, noises)) if rank[1]]
        total = sum(count for count, _ in of_ranks)
        return [
            sum(count * found[index] for count, found in of_ranks) / total
            for index in range(len(layouts))
        ]

    ## Transformation of a group ##

    def _compute_insertion(
        self,
        group: SharedInput,
        layout: TransformLayout,
        statistics: InputStatistics | None,
        weights: dict[str, Tensor],
        precision: torch.dtype,
    ) -> FusedTransform:
        """
        :raises ValueError: if moments are not finite, or the stored transform is singular
        """
        moments, heads = None, self._find_value_heads(group)
        if statistics is not None:
            moments = inner_blocks(statistics.moments.mean, layout.block_size)
        try:
            return compute_transform(
                moments,
                weights,
                layout,
                Rotation(self.rotation),
                self.alignment_strength,
                self.dampening_frac,
                precision,
                1 if heads is None else heads.repeats,
            )
        except ValueError as error:
            raise ValueError(f"Cannot transform the input of {group.first}: {error}") from error

    def _is_folded(self, heads: ValueProjection | None, modules: set[Module] | None) -> bool:
        # values which were computed already would meet a projection that expects others
        return heads is not None and (modules is None or self._linears[heads.linear] in modules)

    def _transform_group(
        self,
        group: SharedInput,
        layout: TransformLayout,
        statistics: InputStatistics | None = None,
        modules: set[Module] | None = None,
    ):
        """
        :param statistics: of the input; None if it was not seen
        :param modules: see :meth:`_transform_groups`
        """
        heads = self._find_value_heads(group)
        is_fused = self._is_folded(heads, modules)
        device = get_execution_device(group.linears[group.first])
        # what stays goes before all that is temporary: gaps which it leaves in between can add
        # up to as much memory as the model takes
        stored = None
        if not is_fused:
            size = layout.stored_size
            shape = (group.in_features // size, size, size)
            stored = torch.empty(shape, dtype=self.precision, device=device)
        weights = read_weights(group, device)
        precision = torch.float64 if is_fused else self.precision
        insertion = self._compute_insertion(group, layout, statistics, weights, precision)
        new_weights = insertion.transform_weights(weights)

        sample = statistics and statistics.sample
        clip_ratio = None
        if sample is not None and sample.tokens is not None:
            tokens = sample.tokens.to(device, torch.float64)
            token_weights = sample.weights.to(device)
            transformed = insertion.transform_tokens(tokens)
            if self.clip_activations:
                clip_ratio = choose_clip_ratio(group, transformed, token_weights)
        # each rank has a sample of its own
        ratios = of_all_ranks(clip_ratio)
        clip_ratio = max((ratio for ratio in ratios if ratio is not None), default=1.0)
        if sample is not None and sample.tokens is not None and is_source_process():
            report = GroupReport.measure(
                group,
                layout,
                insertion.blocks,
                statistics.moments.count,
                token_weights,
                clip_ratio,
                before=(tokens, weights),
                after=(transformed, new_weights),
            )
            report.log()

        new_values = {}
        if is_fused:
            new_values = fold_into_values(self._linears[heads.linear], heads, insertion.blocks)

        # offloaded weights can be shared between ranks: all read before any writes
        barrier()
        for name, linear in group.linears.items():
            update_offload_parameter(
                linear, "weight", new_weights[name].to(linear.weight.dtype)
            )
        for name, value in new_values.items():
            update_offload_parameter(self._linears[heads.linear], name, value)
        barrier()
        if stored is not None:
            stored.copy_(insertion.blocks)
        self._attach(group, layout, stored, clip_ratio)
        if is_fused:
            self._config.folded |= dict.fromkeys(group.linears, heads.linear)

    def _attach(
        self, group: SharedInput, layout: TransformLayout, blocks: Tensor | None, clip_ratio: float
    ):
        """
        :param blocks: None if they are not applied at run time
        """
        self._transformed.update(group.linears)
        if blocks is None and layout.online_hadamard_size == 1 and clip_ratio == 1:
            return
        scheme, args = self._config.add_group(
            list(group.linears),
            None if blocks is None else layout.stored_size,
            layout.online_hadamard_size,
            layout.fused_hadamard_size if layout.online_hadamard_size > 1 else 1,
            clip_ratio,
            self.precision,
        )
        weight = None if blocks is None else Parameter(blocks, requires_grad=False)
        CATTransform(weight, scheme, args).attach(list(group.linears.values()))

    def _rotate_unseen(self):
        """Linears which saw no tokens, such as unused experts, are only rotated"""
        unseen = [name for name in self._linears if name not in self._transformed]
        mapped = [
            group
            for group in self._calibration.observer.groups
            if group.first not in self._transformed
        ]
        if not unseen:
            return
        logger.warning(
            f"{len(unseen)} of {len(self._linears)} Linears saw no calibration tokens, and "
            f"are rotated without alignment: {', '.join(unseen[:10])}"
            + (", ..." if len(unseen) > 10 else "")
        )
        for group in mapped:
            self._transform_group(group, self._geometry(group))
        for name in unseen:
            if name not in self._transformed:
                group = SharedInput({name: self._linears[name]})
                self._transform_group(group, self._geometry(group))
