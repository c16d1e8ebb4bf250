# SPDX-License-Identifier: Apache-2.0
import pytest

from cat_modifier.analysis.schemes import Scheme


def test_channel_and_token_wise_by_default():
    scheme = Scheme.parse("w4a8")
    assert scheme.name == "W4A8" and scheme.bits == (4, 8)
    assert scheme.weights.strategy == "channel" and scheme.weights.symmetric
    assert scheme.activations.strategy == "token" and not scheme.activations.symmetric
    assert scheme.activations.dynamic is True


def test_groups():
    scheme = Scheme.parse("W4G64A4G32")
    assert (scheme.weights.strategy, scheme.weights.group_size) == ("group", 64)
    assert (scheme.activations.strategy, scheme.activations.group_size) == ("group", 32)


def test_16_bits_are_not_quantized():
    assert Scheme.parse("W4A16").activations is None
    assert Scheme.parse("W16A8").bits == (None, 8)


@pytest.mark.parametrize(
    "name", ["", "W4", "int4", "W4A1", "W12A8", "W4A4G0", "W4A4-sym", "W16A16"]
)
def test_other_names_are_an_error(name):
    with pytest.raises(ValueError, match="should be like W4A4"):
        Scheme.parse(name)
