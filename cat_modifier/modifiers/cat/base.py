# SPDX-License-Identifier: Apache-2.0
"""CATModifier: its options and its lifecycle."""

from collections.abc import Sized
from typing import Annotated, Literal

import torch
import tqdm
from compressed_tensors import TRANSFORM_CONFIG_NAME
from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import OffloadCache
from compressed_tensors.utils import TorchDtype, get_execution_device
from llmcompressor.core import Event, EventType, State
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modifiers import Modifier
from llmcompressor.utils import untie_word_embeddings
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from torch.nn import Linear, Module

from cat_modifier.calibration.attention import ValueProjection, find_value_projections
from cat_modifier.calibration.collector import InputStatistics
from cat_modifier.calibration.default_ignore import DEFAULT_IGNORE
from cat_modifier.calibration.padding import predicted_tokens
from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.checkpoint.integers import packed_format
from cat_modifier.checkpoint.schema import CATTransformConfig
from cat_modifier.checkpoint.token_batch import batch_tokens
from cat_modifier.functional.alignment import DEFAULT_DAMPENING_FRAC
from cat_modifier.functional.layout import (
    Rotation,
    TransformLayout,
    choose_attention_layout,
    choose_layout,
)
from cat_modifier.functional.sqnr import to_db
from cat_modifier.functional.tensor_parallel import largest_tensor_parallel_size
from cat_modifier.hub.run_record import RunRecord, command_of, dataset_ids
from cat_modifier.integrations.transformers.saving import (
    check_complete,
    mark_complete,
    mark_incomplete,
    save_atomically,
)
from cat_modifier.modifiers.cat import pipeline, processor
from cat_modifier.modifiers.cat.apply import LinearWeights, apply_transforms
from cat_modifier.modifiers.cat.distributed import gather, rank
from cat_modifier.modifiers.cat.function_check import FunctionCheck
from cat_modifier.modifiers.cat.hooks import CalibrationHooks
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan
from cat_modifier.modifiers.cat.inputs import PlanningUnit, describe_input, planning_units
from cat_modifier.modifiers.cat.log import (
    log_overhead,
    log_transform,
    warn_if_unaligned,
    warn_of_unseen,
)
from cat_modifier.modifiers.cat.matching import match_linears, match_mappings
from cat_modifier.modifiers.cat.pipeline import is_resident
from cat_modifier.modifiers.cat.plan import plan_transforms
from cat_modifier.modifiers.cat.plan_options import OverheadUnit, PlanOptions
from cat_modifier.modifiers.cat.sharding import (
    count_heads,
    inputs_to_shard,
    may_be_sharded,
)
from cat_modifier.modifiers.cat.validation import (
    check_earlier_quantizers,
    check_earlier_transforms,
    check_later_transforms,
    check_quantized,
    check_same_inputs,
    check_shared_pass,
    clear_schemes_of_failed_run,
    warn_if_not_quantized,
    warn_if_not_served,
)
from cat_modifier.modifiers.cat.weighted_tokens import WeightedTokens
from cat_modifier.modifiers.decoding_layers import find_decoding_layers
from cat_modifier.modifiers.forward import run_batch

__all__ = ["CATModifier"]

_SAMPLE_SIZE = 64
"""Tokens of each input that are kept, to clip ranges and to predict noise"""

pipeline.register()
processor.register()


class CATModifier(Modifier):
    """
    Inserts concentration-alignment transforms (CAT, arXiv 2603.04359) before Linears, so
    that weights and activations lose less to quantization at low bit widths.

    For each input that Linears share, the block-diagonal transform ``T`` of best alignment
    is computed in closed form from the second moments of the input and of the weights, and
    followed by a Hadamard rotation for concentration. In attention, tokens count by how much
    its output feels them: the first tokens of a text, which all others read, count most
    (:mod:`cat_modifier.calibration.sensitivity`). The inverse of ``T`` is fused into
    the weights; ``T`` itself runs online, before the activations are quantized. The
    function of the model does not change; clipping of activations is part of their
    quantization. Put a QuantizationModifier or GPTQModifier after it.

    Sample yaml:
    ```yaml
    quant_stage:
      quant_modifiers:
        CATModifier:
          transform_block_size: 128
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
        - remove what an earlier run left on the model if it failed
    - on_calibration_start
        - check the recipe and the model
        - pass one batch through the model, to find value projections
        - hook the Linears, to collect statistics of their inputs, and attention, which runs
          once more with a backward pass
    - on_sequential_epoch_end
        - for each input whose Linears have all run: plan its transform, then apply it
    - on_calibration_end
        - the same for inputs that are left, and for Linears that saw no tokens
    - on_finalize, also of a run that failed
        - remove hooks
        - choose the format of integer weights

    :param transform_block_size: k, number of input channels that a block of T mixes. Upper
        bound: if it does not divide the input of a Linear, the largest usable divisor below
        it is taken. 1 scales channels. "full" is one block over the whole input; it needs
        memory and run time in the square of the input size
    :param rotation: rotation after the blocks. `"hadamard"`: Hadamard over the whole input;
        part is fused into the blocks, the rest runs online. `"block-hadamard"` and
        `"eigen-hadamard"` mix the channels of a block and are fused. `"none"`: blocks alone
    :param alignment_strength: exponent of the alignment transform. 1 is optimal for uniform
        rounding noise (integers), 0 leaves the rotation alone. Finite and not negative
    :param dampening_frac: fraction of the mean eigenvalue of each block of second moments
        that is added to its diagonal; positive
    :param targets: Linears to transform, by name, class or `re:` pattern
    :param ignore: exceptions from `targets`. Default: the lm_head, heads of classifiers,
        routers of experts, kv_b_proj and dt_proj, towers for images and sound, and what
        connects them
    :param mappings: Linears that share a transform, as lists of patterns, one list for each
        input, e.g. `[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]]`. Default: the Linears
        that are observed to read the same input
    :param fuse_attention: fuse the transform before o_proj into v_proj, one block per KV
        head. Only the Hadamard product of `rotation: hadamard` stays online. Where attention
        is observed to do more than mix values, and with `transform_block_size: full`, that
        input is treated as all others. LoRA adapters of the original model do not fit these
        two Linears
    :param clip_activations: clip each token's range to a ratio in [0.6, 1], searched per
        input. Asymmetric per-token integer activations only
    :param precision: dtype of the stored T: int8, bfloat16, float16 or float32. The inverse is
        taken of T as stored. `"auto"`: int8, or bfloat16 where rounding to int8 would change
        tokens by more than a hundredth of their energy
    :param max_overhead: limit for what the transforms of a decoding layer cost online,
        relative to its Linears, for the tokens of the calibration (with experts, pass
        `moe_calibrate_all_experts=False` to oneshot). Blocks then have several sizes up to
        `transform_block_size`: larger where predicted noise falls most for the cost. Default:
        no limit
    :param overhead_unit: unit of `max_overhead`. `"multiply-adds"`: the time of long prompts.
        `"bytes"`: that of generated tokens, for which T and the weights are read
    :param tensor_parallel_size: largest tensor parallel size at which the checkpoint can be
        served. Blocks and Hadamard products of inputs that may be sharded (o_proj,
        down_proj, and all that the model's `tp_plan` does not call `colwise`) then stay
        within one shard. `"auto"`: the largest power of two, up to 8, that divides heads and
        inputs and leaves the blocks at least half of their size
    """

    requires_calibration_data: bool = True

    transform_block_size: int | Literal["full"] = 128
    rotation: Literal["hadamard", "block-hadamard", "eigen-hadamard", "none"] = "hadamard"
    alignment_strength: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    dampening_frac: float = Field(default=DEFAULT_DAMPENING_FRAC, gt=0.0, allow_inf_nan=False)
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=lambda: list(DEFAULT_IGNORE))
    mappings: list[list[str]] | None = None
    fuse_attention: bool = True
    clip_activations: bool = True
    precision: TorchDtype | Literal["auto"] = "auto"
    max_overhead: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    overhead_unit: OverheadUnit = "multiply-adds"
    tensor_parallel_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"

    _linears: dict[str, Linear] = PrivateAttr(default_factory=dict)
    _layers: dict[str, Module] = PrivateAttr(default_factory=dict)
    _value_projections: dict[str, ValueProjection] = PrivateAttr(default_factory=dict)
    _calibration: CalibrationHooks = PrivateAttr()
    _config: CATTransformConfig = PrivateAttr()
    _check: FunctionCheck = PrivateAttr()
    _finished: set[Module] = PrivateAttr(default_factory=set)
    _transformed: set[str] = PrivateAttr(default_factory=set)
    _unaligned: list[str] = PrivateAttr(default_factory=list)
    _is_resident: bool = PrivateAttr(default=False)
    _ranks: int = PrivateAttr(default=1)
    _record: RunRecord = PrivateAttr()

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _wrap_singleton(cls, value):
        return [value] if isinstance(value, str) else value

    @field_validator("transform_block_size")
    @classmethod
    def _validate_block_size(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(
                f"`transform_block_size` must be a positive integer or 'full', got {value}"
            )
        return value

    @field_validator("precision")
    @classmethod
    def _validate_precision(cls, value: torch.dtype | str) -> torch.dtype | str:
        if value not in ("auto", torch.int8, torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"`precision` must be auto, int8, bfloat16, float16 or float32, got {value}"
            )
        return value

    @property
    def prefers_single_pass(self) -> bool:
        """Whether one pass over the whole model is best: see :mod:`.pipeline`"""
        return self._is_resident

    ## Lifecycle ##

    def on_initialize(self, state: State, **kwargs) -> bool:
        """
        Find the Linears, and choose the pipeline.

        :raises ValueError: if there is nothing to transform or to calibrate on, a target
            cannot be transformed, an earlier modifier quantizes, a later one would undo the
            transforms, an earlier run transformed a part of the model, or `max_overhead` is
            set for a model without decoding layers
        """
        check_complete(state.model)
        data = state.data.calib
        if data is None:
            raise ValueError("CATModifier needs calibration data: pass a `dataset` to oneshot")
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError("The calibration dataset is empty")
        self._linears = match_linears(state.model, self.targets, self.ignore)
        check_later_transforms(self)
        check_earlier_quantizers(self._linears, self)
        clear_schemes_of_failed_run(state.model, self)
        warn_if_not_quantized(self)
        self._layers = find_decoding_layers(state.model)
        if self.max_overhead is not None and not self._layers:
            raise ValueError(
                f"{type(state.model).__name__} does not name its decoding layers, which "
                "`max_overhead` is for: set its `_no_split_modules` to their classes"
            )
        # statistics of all inputs are held at once then: they must be smaller than the model
        is_small = self._statistics_size() < _size(state.model)
        # all ranks take the same way
        self._is_resident = all(gather(is_resident(state.model) and is_small))
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs):
        """
        Check recipe and model, find value projections, hook the Linears.

        :raises ValueError: if another modifier shares the calibration pass, an input has a
            transform, or weights are quantized already
        """
        check_shared_pass(self)
        self._record = self._start_record(state)
        self._config = check_earlier_transforms(state.model, self._linears)
        check_quantized(self._linears, self)
        warn_if_not_served(state.model, self._linears)
        # the weight of an lm_head that is tied to the embedding cannot change alone
        if state.model.get_output_embeddings() in self._linears.values():
            untie_word_embeddings(state.model)
        if self.fuse_attention and self.transform_block_size != "full":
            self._value_projections = self._find_value_projections(state)
        self._ranks = self._find_tensor_parallel_size(state)
        self._calibration = self._watch(state)
        self._check = FunctionCheck(state.model, self._linears, self._layers)
        masks = self._calibration.collector.masks
        self._check.watch(
            self.register_hook, lambda name: masks.of(name, state.current_batch_idx)
        )

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[Module], **kwargs
    ):
        self._finished.update(modules)
        ready = [
            one
            for one in self._calibration.collector.pending()
            if self._finished.issuperset(one.linears.values())
        ]
        self._plan_and_apply(state, ready, set(modules))

    def on_calibration_end(self, state: State, event: Event, **kwargs):
        """
        Transform what is left. The model can be saved then.

        :raises ValueError: if no Linear saw any tokens
        """
        self.remove_hooks()
        self._plan_and_apply(
            state, self._calibration.collector.pending(), set(state.model.modules())
        )
        if not self._transformed:
            raise ValueError(
                "CATModifier saw no tokens: pass a calibration `dataset` of more than padding"
            )
        self._rotate_unseen(state)
        if is_source_process():
            warn_if_unaligned(self._unaligned, self.alignment_strength)
        batch_tokens(state.model)
        self._record.attach(state.model)
        mark_complete(state.model)
        del self._calibration, self._check

    def on_finalize(self, state: State, **kwargs) -> bool:
        # llm-compressor calls this for a run that failed when the next one begins
        self.remove_hooks()
        for linear in self._linears.values():
            scheme = getattr(linear, "quantization_scheme", None)
            if scheme is not None and scheme.format is None:
                scheme.format = packed_format(scheme.weights, scheme.input_activations)
        return True

    def outline(self, state: State) -> list[InputToPlan]:
        """
        Describe the inputs that a run would transform, without transforming any.

        Needs no real weights: the layouts of transforms depend on shapes, and on the Linears
        that are observed to read one tensor. With `max_overhead`, a run may choose smaller
        blocks.

        :param state: state of an initialized session, with a little data
        :return: inputs with their layouts
        """
        self.on_calibration_start(state, Event(type_=EventType.CALIBRATION_START))
        for index, batch in enumerate(state.data.calib or ()):
            state.current_batch_idx = index
            run_batch(state, batch)
        self.remove_hooks()
        pending = {one.first for one in self._calibration.collector.pending()}
        _, inputs = self._calibration.unseen(self._transformed)
        return [
            describe_input(
                one,
                self._shards(state, one),
                self._layout(state, one),
                self._calibration.collector.take(one) if one.first in pending else None,
                self._value_projection(one),
                is_anything_quantized=True,
            )
            for one in inputs
        ]

    ## Calibration ##

    def _statistics_size(self) -> int:
        """Bytes of the second moments of all inputs, counted once for each Linear"""
        k = self.transform_block_size
        sizes = [one.in_features for one in self._linears.values()]
        return sum(4 * d * (d if k == "full" else min(k, d)) for d in sizes)

    def _start_record(self, state: State) -> RunRecord:
        """Note model and data before anything changes; continue an earlier modifier's"""
        if (earlier := RunRecord.of(state.model)) is not None:
            return earlier
        data = state.data.calib
        sampler = getattr(data, "sampler", None)
        return RunRecord(
            size_before=_size(state.model),
            dtype=str(state.model.dtype).removeprefix("torch."),
            samples=len(sampler) if isinstance(sampler, Sized) else None,
            datasets=dataset_ids(getattr(data, "dataset", None)),
            command=command_of(state.model),
        )

    def _find_value_projections(self, state: State) -> dict[str, ValueProjection]:
        """Find them on one batch; those that all ranks agree on"""
        # one and the same batch: by default, oneshot shuffles the data anew for each pass
        batch = next(iter(state.data.calib or ()))
        # all experts read all tokens: inputs are compared, and rounding may change a route
        with moe_calibration_context():
            found = find_value_projections(
                state.model,
                self._linears,
                lambda: run_batch(state, batch),
                predicted_tokens(state.model, batch),
            )
        everywhere = gather(found)
        return {
            name: projection
            for name, projection in found.items()
            if all(of_rank.get(name) == projection for of_rank in everywhere)
        }

    def _watch(self, state: State) -> CalibrationHooks:
        """Hook the model, to collect statistics of inputs"""

        def new_statistics(shared: SharedInput) -> InputStatistics:
            block_size = self._layout(state, shared).block_size
            return InputStatistics(shared.in_features, block_size, _SAMPLE_SIZE, rank())

        # without alignment, second moments are of no use
        layers = self._layers if self.alignment_strength else {}
        data = state.data.calib
        batches = len(data) if isinstance(data, Sized) else None
        weighted = WeightedTokens(self._linears, layers, batches, rank())
        hooks = CalibrationHooks(state.model, self._linears, new_statistics, weighted)
        if self.mappings is not None:
            hooks.collector.observer.set_inputs(
                match_mappings(state.model, self.mappings, self.ignore, self._linears)
            )
        hooks.register(self.register_hook, lambda: state.current_batch_idx)
        return hooks

    def _find_tensor_parallel_size(self, state: State) -> int:
        if self.tensor_parallel_size != "auto":
            return self.tensor_parallel_size
        size = largest_tensor_parallel_size(
            *count_heads(state.model.config),
            inputs_to_shard(state.model, self._linears, self._value_projections),
            self.transform_block_size,
            Rotation(self.rotation),
        )
        if is_source_process():
            logger.info(f"tensor_parallel_size: up to {size} ranks can serve the checkpoint")
        return size

    def _shards(self, state: State, shared: SharedInput) -> int:
        is_sharded = self._ranks > 1 and may_be_sharded(state.model, shared.linears)
        return self._ranks if is_sharded else 1

    def _layout(self, state: State, shared: SharedInput) -> TransformLayout:
        """Choose the largest layout"""
        shards, rotation = self._shards(state, shared), Rotation(self.rotation)
        sizes = (shared.first, shared.in_features, shards)
        if projection := self._value_projection(shared):
            return choose_attention_layout(*sizes, projection.head_dim, rotation)
        return choose_layout(*sizes, self.transform_block_size, rotation)

    def _value_projection(self, shared: SharedInput) -> ValueProjection | None:
        # `mappings` may put o_proj with Linears that read another tensor than the values
        if len(shared.linears) > 1:
            return None
        return self._value_projections.get(shared.first)

    ## Transforms ##

    def _plan_and_apply(self, state: State, ready: list[SharedInput], modules: set[Module]):
        """
        Plan the transforms of some inputs, apply them, and check the function of the layers.

        :param ready: inputs whose statistics are complete
        :param modules: modules whose outputs are computed anew after this
        """
        check_same_inputs(ready)
        projections = {}
        for one in ready:
            projection = self._value_projection(one)
            # values that were computed before would meet an o_proj that expects others
            if projection is not None and self._linears[projection.linear] in modules:
                projections[one.first] = projection
        layers = () if self.max_overhead is None else self._layers
        units = planning_units(ready, projections, layers, self._transformed)
        names = [name for one in ready for name in one.linears]
        before = self._check.outputs(names)
        is_quiet = not units or not is_source_process()
        for unit in tqdm.tqdm(units, desc="Transforming", disable=is_quiet):
            self._transform_unit(state, unit, projections)
        self._check.compare(before, self._transformed)

    def _transform_unit(
        self, state: State, unit: PlanningUnit, projections: dict[str, ValueProjection]
    ):
        inputs = []
        is_anything_quantized = any(
            getattr(one, "quantization_scheme", None) for one in self._linears.values()
        )
        for shared in unit.inputs:
            statistics = None
            if unit.is_seen:
                statistics = self._calibration.collector.take(shared)
                device = get_execution_device(shared.linears[shared.first])
                statistics.reduce(device)
                if not statistics.second_moments.count:
                    continue  # all padding: treated as unseen in the end
                statistics.tokens_read = sum(
                    gather(self._calibration.collector.tokens_read(shared))
                )
            inputs.append(
                describe_input(
                    shared,
                    self._shards(state, shared),
                    self._layout(state, shared),
                    statistics,
                    projections.get(shared.first),
                    is_anything_quantized,
                )
            )
        if not inputs:
            return
        options = PlanOptions(
            Rotation(self.rotation),
            self.alignment_strength,
            self.dampening_frac,
            self.clip_activations,
            None if self.precision == "auto" else self.precision,
            self.max_overhead if unit.layer else None,
            self.overhead_unit,
        )
        plan = plan_transforms(inputs, LinearWeights(self._linears), options, unit.layer or "")
        # weights change from here on: a run that fails must not be saved as another model
        setattr(state.model, TRANSFORM_CONFIG_NAME, self._config)
        save_atomically(state.model)
        mark_incomplete(state.model)
        apply_transforms(plan.transforms, self._linears, self._config)
        for one in plan.transforms:
            self._transformed.update(one.source.names)
            if one.is_rotation:
                self._unaligned.append(one.source.first)
            if one.source.is_quantized and one.before is not None and one.after is not None:
                sqnr = to_db(one.before.sqnr), to_db(one.after.sqnr)
                self._record.add(one.source.names, one.source.tokens_read, *sqnr)
            if is_source_process():
                log_transform(one)
        if plan.overhead is not None and self.max_overhead and is_source_process():
            log_overhead(unit.layer or "", plan.overhead, self.max_overhead, self.overhead_unit)

    def _rotate_unseen(self, state: State):
        """Rotate Linears that saw no tokens, such as unused experts, without alignment"""
        bypassed, unseen = self._calibration.unseen(self._transformed)
        if is_source_process():
            warn_of_unseen(unseen, bypassed, len(self._linears))
        for shared in unseen:
            projection = self._value_projection(shared)
            projections = {} if projection is None else {shared.first: projection}
            self._transform_unit(state, PlanningUnit([shared], is_seen=False), projections)


def _size(model: Module) -> int:
    """Bytes of the parameters of a model"""
    with OffloadCache.disable_onloading():  # onloading would make copies
        return sum(p.numel() * p.element_size() for p in model.parameters())
