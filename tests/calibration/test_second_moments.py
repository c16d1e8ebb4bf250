# SPDX-License-Identifier: Apache-2.0
import torch

from cat_modifier.calibration.second_moments import SecondMoments


def test_blocks_are_those_of_the_whole_moment():
    x = torch.randn(100, 24)
    moments = SecondMoments(24, 8)
    for batch in x.split(33):
        moments.update(batch)
    whole = x.T @ x / len(x)
    for i in range(3):
        span = slice(8 * i, 8 * (i + 1))
        assert torch.allclose(moments.mean[i], whole[span, span], atol=1e-5)
    assert moments.count == 100


def test_float32_stays_accurate_over_millions_of_tokens():
    torch.manual_seed(0)
    moments = SecondMoments(8, 8)
    exact = torch.zeros(8, 8, dtype=torch.float64)
    scale = torch.logspace(-2, 2, 8)
    for _ in range(4000):
        batch = torch.randn(1000, 8) * scale + scale
        moments.update(batch)
        exact += batch.double().T @ batch.double()
    exact /= moments.count
    assert moments.count == 4_000_000
    assert ((moments.mean[0] - exact).abs() / exact.abs()).max() < 1e-5


def test_small_batches_are_not_lost_after_many_tokens():
    moments = SecondMoments(1, 1)
    moments.update(torch.ones(20_000_000, 1))
    for _ in range(1000):
        moments.update(torch.full((1000, 1), 2.0))
    assert abs(moments.mean.item() - 24 / 21) < 1e-5


def test_empty_batches_change_nothing():
    moments = SecondMoments(4, 2)
    moments.update(torch.empty(0, 4))
    assert moments.mean is None and moments.count == 0
