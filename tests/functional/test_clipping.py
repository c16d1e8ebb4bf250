# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from cat_modifier.functional.clipping import best_clip_ratio, clip_tokens
from cat_modifier.functional.sqnr import energy, quantization_range, quantize_by_range


def tokens_of(bits: int) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits, type="int", strategy="token", symmetric=False, dynamic=True
    )


def test_the_range_of_a_clipped_token_is_what_it_was_clipped_to():
    # the values of some tokens are all positive, or all negative
    x = torch.randn(20, 300) + torch.linspace(-6, 6, 20)[:, None]
    found = quantization_range(clip_tokens(x, 0.7), tokens_of(4))
    assert torch.allclose(found, 0.7 * quantization_range(x, tokens_of(4)))
    assert torch.equal(clip_tokens(x, 1.0), x)


@pytest.mark.parametrize("bits, low, high", [(3, 0.6, 0.75), (4, 0.7, 0.85), (8, 0.94, 1.0)])
def test_the_fewer_bits_the_more_is_clipped(bits, low, high):
    x = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    ratio = best_clip_ratio(x, tokens_of(bits))
    assert low <= ratio <= high

    def error(ratio):
        return energy(quantize_by_range(clip_tokens(x, ratio), tokens_of(bits)) - x)

    assert error(ratio) <= min(error(one / 50) for one in range(30, 51))


def test_values_of_one_size_are_not_clipped():
    """A Hadamard product makes such values from a token with a single outlier"""
    signs = torch.randn(50, 256, generator=torch.Generator().manual_seed(0)).sign()
    assert best_clip_ratio(signs, tokens_of(4)) == 1


def test_tokens_count_as_their_weights_say():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 256, generator=generator)
    x[10:] = x[10:].sign()
    first = torch.arange(20) < 10
    assert best_clip_ratio(x, tokens_of(4), first.double()) < 0.9
    assert best_clip_ratio(x, tokens_of(4), (~first).double()) == 1
