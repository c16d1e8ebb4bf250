# SPDX-License-Identifier: Apache-2.0
"""
Fused experts with integer weights and activations of at most 8 bits, on CPUs: transform,
quantize, multiply, expert by expert.

The transform happens inside the experts: the router and shared experts read the input as it is.
"""

import torch
from compressed_tensors.quantization import QuantizationType
from torch import Tensor
from torch.nn import Module, Parameter

from cat_modifier.integrations.vllm.compat import (
    ApplyMoEActivationConfig,
    CompressedTensorsConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    FusedMoeWeightScaleSupported,
    RoutedExperts,
    apply_moe_activation,
    current_platform,
    get_current_vllm_config_or_none,
    get_forward_context,
    replace_parameter,
    set_weight_attrs,
)
from cat_modifier.integrations.vllm.expert_inputs import ExpertInputs
from cat_modifier.integrations.vllm.int8_linear import Integers, keeps_packed
from cat_modifier.integrations.vllm.kernels import (
    FLOATS_NEED_A_GPU,
    Int8Kernel,
    choose_kernel,
)
from cat_modifier.integrations.vllm.registry import TransformedInput, TransformRegistry
from cat_modifier.integrations.vllm.unloaded import check_loaded, fill_unloaded
from cat_modifier.integrations.vllm.whole import whole_experts

__all__ = ["Int8ExpertsMethod", "find_experts_method"]

_ADVICE = (
    "add 're:.*[.]experts[.].*' to `ignore` of CATModifier, and quantize the experts as vLLM "
    "serves them, or not at all"
)


def find_experts_method(
    config: CompressedTensorsConfig,
    registry: TransformRegistry,
    layer: RoutedExperts,
    prefix: str,
) -> "Int8ExpertsMethod | None":
    """
    Find the method for the experts of a layer.

    :param config: config that knows the schemes of Linears
    :param registry: all transforms of the model
    :param prefix: name of the layer
    :return: None for experts without transforms that vLLM's own methods serve
    :raises NotImplementedError: if the experts have transforms, but cannot be served with
        them, if they have biases, or if they are 4-bit floats on a CPU
    """
    if layer.moe_config.has_bias:
        # gpt-oss, whose loader would pass over the tensors of single experts
        raise NotImplementedError(
            f"{prefix}: vLLM reads experts with biases only as the original model stores them, "
            "and not one by one, as llm-compressor saves them, quantized or not: use this "
            "checkpoint in Transformers, or serve the original"
        )
    registry.adopt_experts(prefix)
    integers = _find_integers(config, layer, prefix)
    if integers is not None and current_platform.is_cpu():
        return Int8ExpertsMethod(integers, registry, layer, prefix)
    if not registry.has_below(prefix):
        _check_floats(config, layer, prefix)
        return None
    if integers is not None:
        raise NotImplementedError(
            f"{prefix}: fused experts with input transforms are served on CPUs, not on this "
            f"{current_platform.device_name}: {_ADVICE}"
        )
    raise NotImplementedError(
        f"{prefix}: fused experts with input transforms are served with integers of at most 8 "
        "bits, symmetric weights of strategy `channel` and dynamic activations of strategy "
        f"`token`, one scheme for all experts of a layer: {_ADVICE}"
    )


def _find_integers(
    config: CompressedTensorsConfig, layer: RoutedExperts, prefix: str
) -> Integers | None:
    """Find the integers of all experts; None if they are no such integers, or have several"""
    config._add_fused_moe_to_target_scheme_map()
    found = set()
    for expert in range(layer.global_num_experts):
        for projection in _projections(layer).values():
            name = f"{prefix}.{expert}.{projection}"
            scheme = config.get_scheme_dict(layer, name)
            found.add(
                scheme
                and Integers.read(
                    scheme.get("weights"),
                    scheme.get("input_activations"),
                    scheme.get("output_activations"),
                    scheme["format"],
                    is_w8a8_left_out=False,
                )
            )
    return found.pop() if len(found) == 1 else None


def _check_floats(config: CompressedTensorsConfig, layer: RoutedExperts, prefix: str):
    """
    :raises NotImplementedError: if vLLM would take a kernel of GPUs on a CPU
    """
    name = f"{prefix}.0.{layer.ckpt_down_proj_name}"
    weights = (config.get_scheme_dict(layer, name) or {}).get("weights")
    if not current_platform.is_cpu() or weights is None:
        return
    if weights.type == QuantizationType.FLOAT and weights.num_bits == 4:
        raise NotImplementedError(f"{prefix}: {FLOATS_NEED_A_GPU}")


def _projections(layer: RoutedExperts) -> dict[str, str]:
    """Name the projections of an expert in the checkpoint by what vLLM calls them"""
    names = {
        "w1": layer.ckpt_gate_proj_name,
        "w2": layer.ckpt_down_proj_name,
        "w3": layer.ckpt_up_proj_name,
    }
    return {key: name for key, name in names.items() if name is not None}


class Int8ExpertsMethod(FusedMoEMethodBase):
    """
    Computes the experts that tokens were routed to one after the other.

    :param integers: integers of all experts
    :param registry: all transforms of the model
    :param layer: the experts
    :param prefix: name of the layer
    """

    def __init__(
        self,
        integers: Integers,
        registry: TransformRegistry,
        layer: RoutedExperts,
        prefix: str,
    ):
        super().__init__(layer.moe_config)
        self.integers = integers
        self.registry = registry
        self.prefix = prefix
        self._keeps_packed = keeps_packed(integers)
        gate, down, up = (_projections(layer).get(key) for key in ("w1", "w2", "w3"))
        experts = [f"{prefix}.{index}" for index in range(layer.global_num_experts)]
        self._w13_sources = [
            self._claim([f"{expert}.{name}" for name in (gate, up) if name])
            for expert in experts
        ]
        self._w2_sources = [self._claim([f"{expert}.{down}"]) for expert in experts]

    def _claim(self, names: list[str]) -> TransformedInput | None:
        source = self.registry.find(names)
        if source is not None:
            self.integers.check_clipping(source.scheme)
            _check_weight_filter(source, self.prefix)
            self.registry.claim(names)
        return source

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ):
        self.dtype = params_dtype
        self.intermediate_size = intermediate_size_per_partition
        gates = self.moe.w13_num_shards * intermediate_size_per_partition
        self._shapes = {
            "w13": (gates, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        for name, (rows, columns) in self._shapes.items():
            self.integers.check_columns(columns)
            self._add_parameters(layer, name, num_experts, rows, columns, extra_weight_attrs)

        tp_size, tp_rank = self.moe.tp_size, self.moe.tp_rank
        local = [
            expert
            for expert in range(layer.global_num_experts)
            if layer.expert_map_manager.map_global_to_local(expert) != -1
        ]
        local.sort(key=layer.expert_map_manager.map_global_to_local)
        size, projections = intermediate_size_per_partition, _projections(layer)
        self.w13_inputs = ExpertInputs(
            self._w13_sources,
            local,
            self.prefix,
            projections,
            hidden_size,
            hidden_size,
            0,
            params_dtype,
        )
        self.w2_inputs = ExpertInputs(
            self._w2_sources,
            local,
            self.prefix,
            projections,
            size * tp_size,
            size,
            tp_rank,
            params_dtype,
        )
        self.w13_inputs.add_to(layer, "w13_")
        self.w2_inputs.add_to(layer, "w2_")

    def _add_parameters(
        self,
        layer: RoutedExperts,
        name: str,
        experts: int,
        rows: int,
        columns: int,
        attributes: dict,
    ):
        """
        :param name: ``w13`` or ``w2``
        """
        dtype = torch.int32 if self.integers.is_packed else torch.int8
        numbers = columns // self.integers.pack_factor
        tensors = {
            self.integers.weight_name: torch.empty(experts, rows, numbers, dtype=dtype),
            "weight_scale": torch.empty(experts, rows, 1, dtype=torch.float32),
        }
        if self.integers.is_packed:
            tensors["weight_shape"] = torch.empty(experts, 2, dtype=torch.int64)
        # one projection of an expert, on all ranks
        outputs, inputs = rows // self.moe.w13_num_shards * self.moe.tp_size, columns
        if name == "w2":
            outputs, inputs = rows, columns * self.moe.tp_size
        load, factor = attributes["weight_loader"], self.integers.pack_factor
        whole = whole_experts(layer, self.prefix, load, outputs, inputs, factor)
        loaders = {self.integers.weight_name: whole}
        for suffix, data in tensors.items():
            parameter = Parameter(fill_unloaded(data), requires_grad=False)
            attributes = attributes | {"weight_loader": loaders.get(suffix, load)}
            set_weight_attrs(parameter, attributes)
            layer.register_parameter(f"{name}_{suffix}", parameter)
            if suffix == "weight_scale":
                kind = FusedMoeWeightScaleSupported.CHANNEL.value
                set_weight_attrs(parameter, {"quant_method": kind})

    def process_weights_after_loading(self, layer: RoutedExperts):
        """
        :raises ValueError: if a transform or a weight was not loaded
        """
        self.registry.check_claimed()
        for inputs in (self.w13_inputs, self.w2_inputs):
            inputs.check_loaded()
            inputs.warm_up(self.integers.input_bits, self.integers.input_symmetric)
        # before the model is compiled, which cannot see it change
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self._activation = ApplyMoEActivationConfig.from_configs(
            self.moe, self.moe_quant_config
        )
        self._products = {name: self._make_products(layer, name) for name in self._shapes}
        self.integers.log(
            choose_kernel(self._keeps_packed).__name__,
            4 if self._keeps_packed else 8,
            " of experts",
        )

    def _make_products(self, layer: RoutedExperts, name: str) -> list["_Product"]:
        weight_name = f"{name}_{self.integers.weight_name}"
        weights = getattr(layer, weight_name).data
        scales = getattr(layer, f"{name}_weight_scale").data
        check_loaded(self.prefix, weight_name, weights, scales)
        kernel = choose_kernel(self._keeps_packed)
        products = [
            _Product(
                kernel("weight", self.integers.input_symmetric, self.dtype),
                self.integers.unpack(weight, *self._shapes[name]),
                scale.clone(),
            )
            for weight, scale in zip(weights, scales, strict=True)
        ]
        replace_parameter(layer, weight_name, weights.new_empty(0))
        return products

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        # asked for by the activation function alone
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        # the compiler cannot follow a loop over the experts that were hit
        return torch.ops.cat_modifier.experts(x, topk_weights, topk_ids, layer.layer_name)

    def compute(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> Tensor:
        """
        :param x: shape (tokens, d)
        :param topk_weights: shape (tokens, experts of a token)
        :param topk_ids: like ``topk_weights``, indices among the experts of all ranks
        :return: sum over the experts on this rank, shape and dtype of x
        """
        integers = self.integers.input_bits, self.integers.input_symmetric
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        shared = None
        if self.w13_inputs.is_shared:
            shared = self.w13_inputs.quantize(0, x, *integers)
        # sums of many experts in the precision of one would round many times
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert, tokens, weights in _routed(topk_ids, topk_weights):
            if shared is None:
                operands = self.w13_inputs.quantize(expert, x[tokens], *integers)
            else:
                q, scales, zero_points = shared
                zero_points = None if zero_points is None else zero_points[tokens]
                operands = q[tokens], scales[tokens], zero_points
            gates = self._products["w13"][expert](*operands)
            hidden = gates.new_empty((len(tokens), self.intermediate_size))
            apply_moe_activation(
                layer.activation, hidden, gates, activation_config=self._activation
            )
            operands = self.w2_inputs.quantize(expert, hidden, *integers)
            found = self._products["w2"][expert](*operands)
            out.index_add_(0, tokens, found.float() * weights[:, None])
        return out.to(x.dtype)


class _Product(Module):
    """
    The int8 product of one projection of one expert. It owns its operands: the layer's
    parameters are those of all experts.

    :param kernel: product without operands
    :param weight: shape (out, in), int8
    :param scale: shape (out, 1), float32
    """

    def __init__(self, kernel: Int8Kernel, weight: Tensor, scale: Tensor):
        super().__init__()
        self._kernel = kernel
        self.weight = Parameter(weight, requires_grad=False)
        self.weight_scale = Parameter(scale, requires_grad=False)
        kernel.process_weights(self, weight)

    def forward(self, q: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        return self._kernel.apply(self, q, scales, zero_points, None)


def _routed(topk_ids: Tensor, topk_weights: Tensor):
    """
    Sort tokens by expert.

    :param topk_ids: shape (tokens, experts of a token); -1 for experts on other ranks
    :return: each expert that was hit, with its tokens and their weights
    """
    ids, weights = topk_ids.flatten(), topk_weights.flatten()
    order = ids.argsort(stable=True)
    experts, counts = ids[order].unique_consecutive(return_counts=True)
    for expert, slots in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        if expert >= 0:
            yield expert, slots // topk_ids.shape[1], weights[slots]


def _check_weight_filter(source: TransformedInput, prefix: str):
    """
    :raises NotImplementedError: if vLLM leaves out the tensors of experts on other ranks
    """
    config = get_current_vllm_config_or_none()
    if config is not None and config.parallel_config.enable_ep_weight_filter:
        raise NotImplementedError(
            f"{prefix}: experts share the transform that is stored with {source.first}, which "
            "`--enable-ep-weight-filter` leaves out on other ranks: serve without it"
        )


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.quant_method.compute(layer, x, topk_weights, topk_ids)


torch.library.define(
    "cat_modifier::experts",
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, str layer_name) -> Tensor",
)
torch.library.register_fake(
    "cat_modifier::experts",
    lambda x, topk_weights, topk_ids, layer_name: torch.empty_like(x),
)
torch.library.impl("cat_modifier::experts", "CPU", _experts)
