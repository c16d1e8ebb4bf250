# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch.nn import Linear, Sequential

from cat_modifier.checkpoint.token_batch import batch_tokens

INPUTS = {"num_bits": 4, "strategy": "token", "symmetric": False, "dynamic": True}


def make_model():
    torch.manual_seed(0)
    model = Sequential(Linear(16, 8))
    scheme = QuantizationScheme(targets=["Linear"], input_activations=INPUTS)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}))
    return model


# tokens whose ranges differ: one scale for all would round the small ones to zero
TOKENS = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
TOKENS *= torch.logspace(-2, 2, 12)[:, None]


@pytest.mark.parametrize("shape", [(12,), (2, 6), (2, 2, 3), (1, 1, 12)])
@torch.no_grad()
def test_a_token_has_its_own_scale_whatever_the_shape(shape):
    model = make_model()
    expected = model(TOKENS)
    batch_tokens(model)
    assert torch.equal(model(TOKENS), expected)
    output = model(TOKENS.reshape(*shape, 16))
    assert output.shape == (*shape, 8)
    assert torch.equal(output.reshape(1, 12, 8), expected)


@torch.no_grad()
def test_compressed_tensors_alone_gives_a_scale_to_all_tokens():
    # if this fails, compressed-tensors has mended it, and `token_batch` can go
    model = make_model()
    smallest = model(TOKENS)[0, 0] - model[0].bias
    others = model(TOKENS[0])[0] - model[0].bias
    assert (others - smallest).norm() > 0.5 * smallest.norm()


@torch.no_grad()
def test_hooks_are_attached_once_and_copied_with_the_model():
    model = make_model()
    for _ in range(2):
        batch_tokens(model)
    assert len(model[0]._forward_pre_hooks) == len(model[0]._forward_hooks) == 1
    copied = copy.deepcopy(model)
    expected = model(TOKENS)[0]
    model(TOKENS[0, :3])
    assert torch.equal(copied(TOKENS[0]), expected)
    assert len(pickle.dumps(model[0]._forward_pre_hooks)) > 0


@torch.no_grad()
def test_no_tokens_at_all():
    model = make_model()
    batch_tokens(model)
    assert model(torch.empty(0, 16)).shape == (0, 8)


def test_linears_without_a_scale_for_each_token_are_left_alone():
    model = Sequential(Linear(16, 8))
    batch_tokens(model)
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(TOKENS[0])
    assert seen == [(12, 16)]
