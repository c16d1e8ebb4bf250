# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from cat_modifier.mathematics.sqnr import (
    activation_concentration,
    alignment,
    predicted_sqnr,
    to_db,
    weight_concentration,
)


def quantized(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """One scale a row, by compressed-tensors"""
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero_point = calculate_qparams(
        x.amin(1, keepdim=True), x.amax(1, keepdim=True), args
    )
    return fake_quantize(x, scale, zero_point, args)


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8), (8, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_prediction_is_what_is_measured(bits, symmetric):
    """Theorem 2.4 on correlated normal data, within 0.5 dB"""
    torch.manual_seed(0)
    mixing = torch.randn(256, 256) / 16
    x, w = torch.randn(2000, 256) @ mixing, torch.randn(300, 256) @ mixing.T
    weight_bits, activation_bits = bits
    wq, xq = quantized(w, weight_bits, True), quantized(x, activation_bits, symmetric)

    signal = (x @ w.T).square().sum()
    measured = signal / (xq @ wq.T - x @ w.T).square().sum()
    predicted = predicted_sqnr(
        weight_bits,
        activation_bits,
        weight_concentration([w], symmetric=True),
        activation_concentration(x, symmetric),
        alignment(
            signal.item() / len(x),
            w.square().sum().item(),
            x.square().sum().item() / len(x),
        ),
    )
    assert to_db(predicted) == pytest.approx(to_db(measured.item()), abs=0.5)


def test_one_more_bit_is_six_decibels():
    sqnr = [predicted_sqnr(bits, bits, 0.1, 0.1, 0.1) for bits in (7, 8)]
    assert to_db(sqnr[1] / sqnr[0]) == pytest.approx(6.05, abs=0.05)


def test_alignment_of_a_weight_with_the_only_direction_of_the_input_is_one():
    x = torch.randn(50, 1) @ torch.randn(1, 8)
    w = torch.randn(3, 1) @ (x[:1] / x[:1].norm())
    energies = (x @ w.T).square().sum() / 50, w.square().sum(), x.square().sum() / 50
    assert alignment(*(energy.item() for energy in energies)) == pytest.approx(1, rel=1e-4)
