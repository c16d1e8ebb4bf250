# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import Linear

from cat_modifier.calibration.padding import padding_mask
from cat_modifier.calibration.shared_inputs import SharedInputObserver


@pytest.fixture
def observer():
    return SharedInputObserver({name: Linear(4, 4) for name in "qkvoudg"})


def members(observer):
    return [list(one.linears) for one in observer.inputs]


def test_linears_with_the_same_input_are_a_group(observer):
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    is_new = [observer.observe(name, x)[1] for name in "vqk"]
    assert is_new == [True, False, False]
    assert observer.observe("o", y)[1]
    assert members(observer) == [["q", "k", "v"], ["o"]]
    assert observer.inputs[0].first == "q"


def test_groups_keep_over_batches(observer):
    for _ in range(3):
        x = torch.randn(2, 4)
        assert [observer.observe(name, x)[1] for name in "qk"] == [True, False]
    assert members(observer) == [["q", "k"]]


def test_equal_values_in_other_memory_are_another_input(observer):
    x = torch.randn(2, 4)
    observer.observe("q", x)
    observer.observe("k", x.clone())
    assert members(observer) == [["q"], ["k"]]


def test_an_input_written_to_in_between_is_another_input(observer):
    x = torch.randn(2, 4)
    observer.observe("q", x)
    observer.observe("k", x.add_(1))
    assert members(observer) == [["q"], ["k"]]


def test_memory_that_is_used_again_is_another_input(observer):
    x = torch.randn(2, 4)
    observer.observe("q", x)
    storage = x.untyped_storage()
    del x
    again = torch.empty(0).set_(storage, 0, (2, 4))
    observer.observe("k", again)
    assert members(observer) == [["q"], ["k"]]


def test_a_view_of_the_same_memory_is_the_same_input(observer):
    x = torch.randn(2, 4)
    observer.observe("q", x)
    observer.observe("k", x.view(2, 4))
    assert members(observer) == [["q", "k"]]


def test_groups_can_be_given(observer):
    observer.set_inputs([["u", "g"]])
    observer.observe("g", torch.randn(2, 4))
    observer.observe("u", torch.randn(2, 4))
    assert members(observer) == [["u", "g"]]


def test_none_joins_an_input_that_is_closed(observer):
    x = torch.randn(2, 4)
    observer.observe("q", x)
    observer.inputs[0].is_closed = True
    assert [observer.observe(name, x)[1] for name in "kvk"] == [True, False, False]
    assert members(observer) == [["q"], ["k", "v"]]


def test_an_input_counts_once_for_each_of_those_given(observer):
    observer.set_inputs([["q", "v"], ["k"]])
    x = torch.randn(2, 4)
    assert [observer.observe(name, x)[1] for name in "qkv"] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_is_read_from_a_causal_mask(dtype):
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
    mask = allowed[:, None]
    if dtype.is_floating_point:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min)
    assert torch.equal(padding_mask(mask), real)
    assert torch.equal(padding_mask(real.long()), real)


@pytest.mark.parametrize("real", [[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
def test_padding_is_read_from_a_mask_of_what_is_hidden(real):
    """MPT passes such a mask"""
    real = torch.tensor([real], dtype=torch.bool)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
    assert torch.equal(padding_mask(~allowed[:, None]), real)


def test_masks_of_another_kind_are_left_alone():
    assert padding_mask(None) is None
    assert padding_mask(object()) is None  # for example a mask of flex attention
    assert padding_mask(torch.ones(2, 1, 4, 9)) is None
