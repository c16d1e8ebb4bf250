# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    fake_quantize,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cat_modifier.functional.alignment import alignment_transform, diagonal_blocks, matrix_power
from cat_modifier.functional.layout import Rotation, TransformLayout
from cat_modifier.functional.sqnr import (
    achievable_alignment,
    alignment,
    concentration,
    energy,
    measured_sqnr,
    parallel_sum,
    predicted_sqnr,
    quantization_range,
    quantize_by_range,
    to_db,
)
from cat_modifier.functional.transform import StoredTransform, compute_blocks

CHANNEL = QuantizationArgs(num_bits=4, strategy="channel")
TOKEN = QuantizationArgs(num_bits=4, strategy="token", symmetric=False, dynamic=True)


def ranges(bits: int, strategy: str, symmetric: bool) -> QuantizationArgs:
    options = {"token": {"dynamic": True}, "group": {"group_size": 32}}.get(strategy, {})
    return QuantizationArgs(num_bits=bits, strategy=strategy, symmetric=symmetric, **options)


def predict(x, w, weight_args, input_args, token_weights=None):
    """Predict SQNR by theorem 2.4 from tensors"""
    weighted = x if token_weights is None else x * token_weights.sqrt()[:, None]
    return predicted_sqnr(
        weight_args.num_bits,
        input_args.num_bits,
        concentration(w, weight_args, None, weighted.square().sum(0)),
        concentration(x, input_args, token_weights, w.square().sum(0)),
        alignment(
            energy(x @ w.T, token_weights),
            w.square().sum().item(),
            energy(x, token_weights),
        ),
    )


def correlated(tokens=2000, channels=256, rows=300):
    torch.manual_seed(0)
    mixing = torch.randn(channels, channels) / channels**0.5
    # channels and tokens of different size: groups and weights of tokens matter
    scales = torch.logspace(-0.3, 0.3, channels)
    x = torch.randn(tokens, channels) @ mixing * scales
    return x * (torch.rand(tokens, 1) + 0.5), torch.randn(rows, channels) @ mixing.T


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8), (8, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategies", [("channel", "token"), ("group", "group")])
def test_prediction_is_what_is_measured(bits, symmetric, strategies):
    """Within 0.3 dB, for the errors of weights, of activations and of both"""
    x, w = correlated()
    token_weights = torch.rand(len(x)).double()
    weight_args = ranges(bits[0], strategies[0], True)
    input_args = ranges(bits[1], strategies[1], symmetric)
    [measured] = measured_sqnr(x, w, [(weight_args, input_args)], token_weights)
    predicted = predict(x, w, weight_args, input_args, token_weights)
    for name in ("weights", "activations", "joint"):
        expected = to_db(getattr(predicted, name))
        assert to_db(getattr(measured, name)) == pytest.approx(expected, abs=0.3), name


def test_prediction_with_one_range_for_all():
    x, w = correlated()
    args = ranges(8, "tensor", True), ranges(8, "tensor", False)
    [measured] = measured_sqnr(x, w, [args])
    assert to_db(measured.joint) == pytest.approx(to_db(predict(x, w, *args).joint), abs=0.3)


def test_products_in_bfloat16_are_accurate_enough():
    x, w = correlated()
    schemes = [(ranges(b, "channel", True), ranges(b, "token", False)) for b in (4, 8)]
    exact = measured_sqnr(x, w, schemes)
    for a, b in zip(measured_sqnr(x, w, schemes, None, torch.bfloat16), exact, strict=True):
        assert to_db(a.joint) == pytest.approx(to_db(b.joint), abs=0.02)


def test_joint_error_is_that_of_the_quantized_product():
    x, w = correlated(100, 64, 30)
    [measured] = measured_sqnr(x, w, [(CHANNEL, TOKEN)])
    wq, xq = quantize_by_range(w, CHANNEL).double(), quantize_by_range(x, TOKEN).double()
    x, w = x.double(), w.double()
    signal = (x @ w.T).square().sum()
    for name, product in (
        ("weights", x @ wq.T),
        ("activations", xq @ w.T),
        ("joint", xq @ wq.T),
    ):
        expected = (signal / (product - x @ w.T).square().sum()).item()
        assert getattr(measured, name) == pytest.approx(expected, rel=1e-3)


def test_what_is_not_quantized_has_no_error():
    x, w = correlated(100, 64, 30)
    weights, activations, neither = measured_sqnr(
        x, w, [(CHANNEL, None), (None, TOKEN), (None, None)]
    )
    assert weights.activations == activations.weights == neither.joint == float("inf")
    assert weights.joint == weights.weights < float("inf")
    assert activations.joint == activations.activations < float("inf")
    predicted = predicted_sqnr(4, None, 0.1, float("nan"), 0.1)
    assert predicted.activations == float("inf") and predicted.joint == predicted.weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor", "token"])
def test_quantizes_as_compressed_tensors_does(strategy, symmetric):
    torch.manual_seed(0)
    x, args = torch.randn(40, 96), ranges(4, strategy, symmetric)
    if strategy == "token":
        tokens = x[None]  # (batch, tokens, channels)
        qparams = compute_dynamic_scales_and_zp(tokens, args, None)
        expected = fake_quantize(tokens, *qparams, args)[0]
    else:
        shape = {"channel": (40, 1, 96), "group": (40, 3, 32), "tensor": (1, 1, -1)}[strategy]
        values = x.reshape(shape)
        scale, zero_point = calculate_qparams(values.amin(-1), values.amax(-1), args)
        if strategy == "tensor":
            scale, zero_point = scale.flatten(), zero_point.flatten()
        expected = fake_quantize(x, scale, zero_point, args)
    assert torch.equal(quantize_by_range(x, args), expected)


def test_without_a_signal_there_is_no_ratio():
    x, w = correlated(20, 64, 30)
    for pair in ((x * 0, w), (x, w * 0)):
        [measured] = measured_sqnr(*pair, [(CHANNEL, TOKEN)])
        assert all(ratio != ratio for ratio in measured)


def test_ranges_of_each_strategy():
    x = torch.tensor([[1.0, -3.0, 2.0, 5.0], [-1.0, -2.0, -4.0, -1.0]])
    assert quantization_range(x, ranges(4, "token", True)).tolist() == [[10.0], [8.0]]
    # zero is always in the range
    assert quantization_range(x, ranges(4, "token", False)).tolist() == [[8.0], [4.0]]
    assert quantization_range(x, ranges(4, "tensor", False)).tolist() == [[9.0], [9.0]]
    group = QuantizationArgs(strategy="group", group_size=2)
    assert quantization_range(x, group).tolist() == [[6.0, 10.0], [4.0, 8.0]]
    block = QuantizationArgs(strategy="block", block_structure=[2, 2])
    assert quantization_range(x, block).tolist() == [[6.0, 10.0], [6.0, 10.0]]
    incomplete = QuantizationArgs(strategy="block", block_structure=[4, 3])
    assert quantization_range(x, incomplete).tolist() == [[8.0, 10.0], [8.0, 10.0]]
    assert quantize_by_range(x, incomplete).shape == x.shape


def test_the_last_group_may_be_incomplete():
    x, args = torch.randn(3, 10), QuantizationArgs(num_bits=4, strategy="group", group_size=4)
    assert quantization_range(x, args).shape == (3, 3)
    last = quantize_by_range(x[:, 8:].contiguous(), CHANNEL)
    assert torch.equal(quantize_by_range(x, args)[:, 8:], last)


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4", "MXFP8", "FP8_DYNAMIC"])
def test_quantizes_floats_as_compressed_tensors_does(scheme):
    torch.manual_seed(0)
    x = torch.randn(1, 40, 96) ** 3
    args = preset_name_to_scheme(scheme, ["Linear"]).input_activations
    global_scale = generate_gparam(x.min(), x.max()) if scheme == "NVFP4" else None
    qparams = compute_dynamic_scales_and_zp(x, args, None, global_scale)
    expected = fake_quantize(x, *qparams, args, global_scale)[0]
    assert torch.equal(quantize_by_range(x[0], args), expected)


def test_weights_of_tokens_are_repetitions():
    x = torch.randn(3, 16)
    repeated = x[[0, 0, 0, 1, 2, 2]]
    weights = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    assert energy(x, weights) == pytest.approx(energy(repeated))
    assert concentration(x, TOKEN, weights) == pytest.approx(concentration(repeated, TOKEN))


def test_one_more_bit_is_six_decibels():
    sqnr = [predicted_sqnr(bits, bits, 0.1, 0.1, 0.1).joint for bits in (7, 8)]
    assert to_db(sqnr[1] / sqnr[0]) == pytest.approx(6.05, abs=0.05)


def test_parallel_sum():
    assert parallel_sum(2.0, 2.0) == 1.0
    assert parallel_sum(3.0, float("inf")) == 3.0
    assert parallel_sum(0.0, 5.0) == 0.0
    assert parallel_sum(float("inf"), float("inf")) == float("inf")


def test_alignment_of_a_weight_with_the_only_direction_of_the_input_is_one():
    x = torch.randn(50, 1) @ torch.randn(1, 8)
    w = torch.randn(3, 1) @ (x[:1] / x[:1].norm())
    aligned = alignment(energy(x @ w.T), w.square().sum().item(), energy(x))
    assert aligned == pytest.approx(1, rel=1e-4)


## Alignment, over random shapes, ranks and spectra ##


@st.composite
def layers(draw):
    """Draw a weight (out, d), inputs (tokens, d) and a block size that divides d, float64"""
    blocks, size = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 8, 12]))
    d = blocks * size
    rank_x, rank_w = draw(st.integers(1, d)), draw(st.integers(1, d))
    decay = draw(st.floats(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def random(rows: int, rank: int) -> torch.Tensor:
        spectrum = torch.logspace(0, -decay, rank, dtype=torch.float64)
        left, right = (
            torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (rows, d)
        )
        return (left * spectrum) @ right.T

    return random(draw(st.integers(1, 20)), rank_w), random(60, rank_x), size


def alignment_of(w, x, transform=None):
    if transform is not None:
        w, x = transform.transform_weight(w), transform.transform_tokens(x)
    return alignment(energy(x @ w.T), w.square().sum().item(), energy(x))


def best_alignment(w, x, size):
    root = matrix_power(diagonal_blocks(x, size) / len(x), 0.5)
    return achievable_alignment(energy(x @ w.T), root, diagonal_blocks(w, size))


@settings(max_examples=60, deadline=None)
@given(layers())
def test_block_optimum_is_at_most_the_full_optimum_and_at_least_the_start(layer):
    w, x, size = layer
    start, block, full = (
        alignment_of(w, x),
        best_alignment(w, x, size),
        best_alignment(w, x, x.shape[1]),
    )
    # tolerance: with low rank, square roots of rounding errors add to the nuclear norm
    assert start <= block * (1 + 1e-5)
    assert block <= full * (1 + 1e-5)
    assert full <= 1 + 1e-5


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(layers())
def test_the_transform_reaches_the_predicted_best_alignment(layer):
    w, x, size = layer
    sx, sw = diagonal_blocks(x, size) / len(x), diagonal_blocks(w, size)
    for second_moments in (sx, sw):  # lower ranks only approach the optimum
        values = torch.linalg.eigvalsh(second_moments)
        assume((values[:, 0] > 1e-4 * values[:, -1]).all())
    blocks = compute_blocks(sx, sw, Rotation.NONE, 1, dampening_frac=1e-9)
    reached = alignment_of(
        w, x, StoredTransform(blocks, TransformLayout(size, 1, 1, "")).invert()
    )
    assert reached == pytest.approx(best_alignment(w, x, size), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_rotations_leave_alignment_unchanged(layer):
    w, x, size = layer
    d = x.shape[1]
    before = alignment_of(w, x)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0][None]
    assert alignment_of(
        w, x, StoredTransform(rotation, TransformLayout(d, 1, 1, "")).invert()
    ) == pytest.approx(before)
    ones = torch.ones(d, 1, 1, dtype=torch.float64)
    for hadamard_size in (n for n in (2, 4, 8, 12) if d % n == 0):
        hadamard = StoredTransform(ones, TransformLayout(1, 1, hadamard_size, "")).invert()
        assert alignment_of(w, x, hadamard) == pytest.approx(before)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_blocks_of_one_channel_are_the_closed_form_scaling(layer):
    w, x, _ = layer
    sx, sw = diagonal_blocks(x, 1) / len(x), diagonal_blocks(w, 1)
    assume(sx.min() > 1e-6 * sx.max() and sw.min() > 1e-6 * sw.max())
    scaling = alignment_transform(sx, sw, 1.0, dampening_frac=1e-12)
    ratio = scaling / (sw / sx) ** 0.25
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-9)
    reached = alignment_of(
        w, x, StoredTransform(scaling, TransformLayout(1, 1, 1, "")).invert()
    )
    assert reached == pytest.approx(best_alignment(w, x, 1), rel=1e-6)
