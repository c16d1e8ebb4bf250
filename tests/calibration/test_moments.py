# SPDX-License-Identifier: Apache-2.0
import torch

from cat_modifier.calibration.moments import BlockMoments, TokenSample


def test_blocks_are_those_of_the_whole_moment():
    x = torch.randn(100, 24)
    moments = BlockMoments(24, 8)
    for batch in x.split(33):
        moments.update(batch)
    whole = x.T @ x / len(x)
    for i in range(3):
        span = slice(8 * i, 8 * (i + 1))
        assert torch.allclose(moments.mean[i], whole[span, span], atol=1e-5)
    assert moments.count == 100


def test_float32_stays_accurate_over_millions_of_tokens():
    torch.manual_seed(0)
    moments = BlockMoments(8, 8)
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
    moments = BlockMoments(1, 1)
    moments.update(torch.ones(20_000_000, 1))
    for _ in range(1000):
        moments.update(torch.full((1000, 1), 2.0))
    assert abs(moments.mean.item() - 24 / 21) < 1e-5


def test_empty_batches_change_nothing():
    moments = BlockMoments(4, 2)
    moments.update(torch.empty(0, 4))
    assert moments.mean is None and moments.count == 0


def test_sample_is_uniform_over_batches_of_any_size():
    sample = TokenSample(200, seed=0)
    for start in range(0, 10_000, 500):
        sample.update(torch.arange(start, start + 500).unsqueeze(1))
    tokens = sample.tokens.flatten()
    assert len(tokens) == len(tokens.unique()) == 200
    assert 4000 < tokens.mean() < 6000
    assert tokens.min() < 500 and tokens.max() > 9500
