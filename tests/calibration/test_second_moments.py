# SPDX-License-Identifier: Apache-2.0
import torch

from cat_modifier.calibration.second_moments import InputStatistics, SecondMoments, TokenSample


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


def test_sample_of_equal_tokens_is_uniform_over_batches_of_any_size():
    sample = TokenSample(200, seed=0)
    angles = torch.linspace(0, 6.28, 10_000)
    tokens = torch.stack([angles.sin(), angles.cos()], dim=1)
    for start in range(0, 10_000, 500):
        sample.update(tokens[start : start + 500])
    assert len(sample.tokens) == len(sample.tokens.unique(dim=0)) == 200
    assert torch.allclose(sample.weights, torch.full((200,), 1 / 200).double(), rtol=0.2)
    assert sample.tokens.mean(0).norm() < 0.2


def test_sample_holds_all_massive_tokens_and_estimates_means_without_bias():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20_000, 16, generator=generator)
    tokens *= torch.rand(20_000, 1, generator=generator) + 0.5
    tokens[::2000, 3] += 1000  # ten tokens hold nearly all energy
    exact = tokens.double().square().mean(0)
    estimates = []
    for seed in range(30):
        sample = TokenSample(64, seed)
        for batch in tokens.split(777):
            sample.update(batch)
        assert (sample.tokens[:, 3] > 500).sum() == 10
        assert sample.weights[sample.tokens[:, 3] > 500].allclose(
            torch.tensor(1 / 20_000).double()
        )
        estimates.append(sample.weights @ sample.tokens.double().square())
    ratios = torch.stack(estimates) / exact
    error = ratios.std(0) / 30**0.5
    assert ((ratios.mean(0) - 1).abs() < 4 * error + 1e-3).all()


def test_sample_of_fewer_tokens_than_asked_for_is_all_of_them():
    sample = TokenSample(100)
    sample.update(torch.randn(30, 4))
    assert len(sample.tokens) == 30
    assert torch.allclose(sample.weights, torch.full((30,), 1 / 30).double())


def test_tokens_of_zeros_have_no_weight():
    sample = TokenSample(8)
    sample.update(torch.zeros(4, 2))
    assert sample.weights.tolist() == [0, 0, 0, 0]


def test_state_goes_on_as_if_never_interrupted():
    batches = torch.randn(6, 50, 8).unbind()
    whole, first, second = (InputStatistics(8, 4, 20) for _ in range(3))
    for batch in batches:
        whole.update(batch)
    for batch in batches[:3]:
        first.update(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.update(batch)
    assert torch.equal(whole.moments.mean, second.moments.mean)
    assert torch.equal(whole.sample.tokens, second.sample.tokens)
    assert torch.equal(whole.sample.weights, second.sample.weights)


def test_tokens_that_are_not_finite_are_in_the_sample_whenever_they_come():
    sample = TokenSample(4)
    for number in range(10):
        tokens = torch.randn(20, 8)
        if number == 8:
            tokens[3, 5] = torch.nan
        sample.update(tokens)
    assert torch.isnan(sample.tokens).any()


def test_a_sample_does_not_depend_on_how_tokens_are_batched_after_it_is_full():
    """What cannot get in is left out early: the result is that of one look at all tokens"""
    tokens = torch.randn(400, 8)
    whole, parts = TokenSample(16), TokenSample(16)
    whole.update(tokens)
    for part in tokens.split(7):
        parts.update(part)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.weights, parts.weights)
