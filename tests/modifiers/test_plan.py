# SPDX-License-Identifier: Apache-2.0
"""Plans on plain tensors, without llm-compressor or a model"""

import subprocess
import sys

import pytest
import torch
from plain_inputs import OPTIONS, make_input, make_weights

from cat_modifier.calibration.attention import ValueProjection
from cat_modifier.functional.layout import (
    Rotation,
    TransformLayout,
    choose_attention_layout,
    choose_layout,
)
from cat_modifier.functional.transform import apply_blocks, multiply_heads
from cat_modifier.modifiers.cat import candidates, plan, prediction
from cat_modifier.modifiers.cat.input_to_plan import InputToPlan
from cat_modifier.modifiers.cat.plan import plan_transforms
from cat_modifier.modifiers.cat.plan_options import PlanOptions


def test_a_plan_keeps_the_function_and_predicts_less_noise():
    names = ["q", "k", "v"]
    weights = make_weights(names)
    (one,) = plan_transforms([make_input(names)], weights, PlanOptions(**OPTIONS)).transforms
    x, fused = one.source.tokens.double(), one.transform.invert()
    for weight in weights.values():
        weight = weight.double()
        product = fused.transform_tokens(x) @ fused.transform_weight(weight).T
        assert torch.allclose(product, x @ weight.T, rtol=1e-6, atol=1e-9)
    assert one.after.sqnr > one.before.sqnr and one.after.alignment > one.before.alignment


def test_blocks_before_the_output_projection_change_the_weights_that_follow():
    """v_proj is planned with the rows that it will have"""
    layout = choose_attention_layout("o", 64, 1, 16, Rotation.HADAMARD)
    projection = ValueProjection("v", head_dim=16, repeats=2)
    attention = make_input(["o"], layout=layout, value_projection=projection)
    reader = make_input(["q", "v"])
    weights = make_weights(["o", "q"]) | make_weights(["v"], out=32)
    options = PlanOptions(**OPTIONS)
    fused, planned = plan_transforms([reader, attention], weights, options).transforms
    assert fused.source is attention and fused.is_fused and not planned.is_fused
    heads = fused.transform.blocks[::2]
    assert torch.equal(fused.transform.blocks[1::2], heads)  # heads that share a value head

    changed = weights | {"v": multiply_heads(weights["v"].double(), heads)}
    (expected,) = plan_transforms([reader], changed, options).transforms
    assert torch.equal(planned.transform.blocks, expected.transform.blocks)
    (other,) = plan_transforms([reader], weights, options).transforms
    assert not torch.allclose(planned.transform.blocks, other.transform.blocks, rtol=0.01)


def test_an_unseen_input_is_rotated():
    source = InputToPlan(("x",), 64, 1, choose_layout("x", 64, 1, 16, Rotation.HADAMARD))
    (one,) = plan_transforms([source], make_weights(["x"]), PlanOptions(**OPTIONS)).transforms
    blocks = one.transform.blocks.double()
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    assert torch.allclose(blocks @ blocks.mT, identity.expand_as(blocks), atol=1e-6)
    assert one.before is None and one.clip_ratio == 1


def test_values_that_are_not_finite_name_the_input():
    source = make_input(["x"])
    source.second_moments[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Cannot transform the input of x: .*not finite"):
        plan_transforms([source], make_weights(["x"]), PlanOptions(**OPTIONS))


# ---- a limit of overhead ----------------------------------------------------------------


def plan_sizes(max_overhead: float, *inputs: InputToPlan) -> list[int]:
    options = PlanOptions(**OPTIONS | {"max_overhead": max_overhead, "rotation": Rotation.NONE})
    weights = make_weights([one.first for one in inputs], out=64)
    planned = plan_transforms(inputs, weights, options, "a layer")
    assert planned.overhead.planned <= max_overhead
    return [one.layout.block_size for one in planned.transforms]


def noisy(name: str, count: int = 1000, is_quantized: bool = True) -> InputToPlan:
    """Make an input for which blocks of 64 channels help: few directions hold its energy"""
    layout = TransformLayout(64, 1, 1, "")
    return make_input(
        [name], layout=layout, tokens=count, is_quantized=is_quantized, block_size=64
    )


def test_larger_blocks_go_where_they_lower_noise():
    # blocks of 64 cost as much as the Linear
    assert plan_sizes(0.25, noisy("a"), noisy("b")) == [16, 16]
    assert plan_sizes(0.7, noisy("a"), noisy("b", is_quantized=False)) == [64, 16]
    assert plan_sizes(1.0, noisy("a"), noisy("b")) == [64, 64]


def make_choice(name: str, noise: float, count: int) -> candidates.Choice:
    """Make a choice of blocks of 64, 32 and 16. Larger blocks have less noise"""
    source = InputToPlan(
        (name,), 64, 1, TransformLayout(64, 1, 1, ""), token_count=count, tokens_read=count
    )
    found = [
        candidates.Candidate(None, 64 * size, prediction.Prediction(1 / (factor * noise), 1.0))
        for size, factor in ((64, 1), (32, 1.2), (16, 1.5))
    ]
    return candidates.Choice(source, 64 * 64, found, None)


def test_an_input_of_few_tokens_is_no_cheap_gain():
    """Noise and cost of an input are both weighted by its tokens"""
    rare, common = make_choice("a", 0.1, count=10), make_choice("b", 0.11, count=990)
    chosen, overhead = plan._choose([rare, common], 0.4985, "multiply-adds", "a layer")
    assert chosen == [2, 1] and overhead.planned <= 0.4985 < overhead.largest


def test_blocks_are_not_larger_than_the_token_count():
    assert plan_sizes(1.0, noisy("a", count=40)) == [32]


def test_a_limit_below_the_cheapest_is_an_error():
    with pytest.raises(ValueError, match="a layer, more than `max_overhead`, 10.00%"):
        plan_sizes(0.1, noisy("a"))


def test_each_transform_is_computed_once(monkeypatch):
    computed = []
    original = candidates.compute_blocks

    def compute(sx, *args):
        computed.append(sx.shape[-1])
        return original(sx, *args)

    monkeypatch.setattr(candidates, "compute_blocks", compute)
    sizes = plan_sizes(0.7, noisy("a"), noisy("b"))
    assert sorted(computed) == [16, 16, 32, 32, 64, 64] and len(sizes) == 2


@pytest.mark.slow
def test_planning_needs_no_llm_compressor():
    program = (
        "import sys; sys.modules['llmcompressor'] = None\n"
        "import cat_modifier.modifiers.cat.plan\n"
        "assert not any(name.startswith('llmcompressor.') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_multiply_heads_is_the_product_with_each_head():
    blocks = torch.randn(2, 4, 4)
    rows = torch.randn(8, 5)
    expected = apply_blocks(rows.T, blocks).T
    assert torch.allclose(multiply_heads(rows, blocks), expected)
    assert torch.allclose(multiply_heads(rows[:, 0], blocks), expected[:, 0])
