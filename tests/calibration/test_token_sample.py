# SPDX-License-Identifier: Apache-2.0
import torch

from cat_modifier.calibration.token_sample import TokenSample


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


def test_tokens_that_are_not_finite_are_in_the_sample_whenever_they_come():
    sample = TokenSample(4)
    for number in range(10):
        tokens = torch.randn(20, 8)
        if number == 8:
            tokens[3, 5] = torch.nan
        sample.update(tokens)
    assert torch.isnan(sample.tokens).any()


def test_a_sample_does_not_depend_on_how_tokens_are_batched_after_it_is_full():
    """Tokens that cannot get in are skipped early, which must not change the sample"""
    tokens = torch.randn(400, 8)
    whole, parts = TokenSample(16), TokenSample(16)
    whole.update(tokens)
    for part in tokens.split(7):
        parts.update(part)
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.weights, parts.weights)
