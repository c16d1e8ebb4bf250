# SPDX-License-Identifier: Apache-2.0
"""Which batches attention runs again for, and who takes its tokens"""

from functools import partial

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.utils.hooks import HooksMixin
from tiny_models import make_loader, make_model, make_tokens
from torch.nn import Linear, Module

from cat_modifier import CATModifier
from cat_modifier.calibration.collector import InputCollector, InputStatistics
from cat_modifier.calibration.padding import PaddingMasks
from cat_modifier.modifiers.cat import weighted_tokens
from cat_modifier.modifiers.cat.weighted_tokens import WeightedTokens

SIZE, LENGTH = 16, 1024


class Attention(Module):
    def __init__(self):
        super().__init__()
        self.value = Linear(SIZE, SIZE)

    def forward(self, x, attention_mask=None):
        return self.value(x).cumsum(-2)


class ParallelLayer(Module):
    """A decoding layer whose MLP reads what attention reads"""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), Linear(SIZE, SIZE)

    def forward(self, x):
        return x + self.attention(x, attention_mask=None) + self.mlp(x)


@pytest.mark.parametrize(("batches", "stride"), [(8, 1), (15, 1), (16, 2), (48, 6), (None, 1)])
def test_enough_tokens_have_weights_and_no_others_count(batches, stride):
    layer = ParallelLayer()
    linears = {"0.attention.value": layer.attention.value, "0.mlp": layer.mlp}
    weighted = WeightedTokens(linears, {"0": layer}, batches, seed=0)
    collector = InputCollector(
        linears, lambda shared: InputStatistics(SIZE, SIZE, 4), PaddingMasks(layer)
    )
    batch, probed, hooks = 0, [], HooksMixin()

    def module_hook(module, args, kwargs, name):
        calls = weighted.enter(name, module, args, kwargs, batch, None)
        for linear, x, weights in calls:
            probed.append(batch)
            collector.observe(linear, x, batch, weights)

    def input_hook(linear, args, name):
        collector.count(name, args[0], batch)
        if not weighted.covers(linear):
            collector.observe(name, args[0], batch)

    for name, module in (("0", layer), ("0.attention", layer.attention)):
        hook = partial(module_hook, name=name)
        hooks.register_hook(module, hook, "forward_pre", with_kwargs=True)
    for name, linear in linears.items():
        hooks.register_hook(linear, partial(input_hook, name=name), "forward_pre")
    with torch.no_grad():
        for batch in range(batches or 20):  # noqa: B007
            layer(torch.randn(1, LENGTH, SIZE))

    assert probed == list(range(0, batches or 20, stride))
    (shared,) = collector.pending()
    assert list(shared.linears) == list(linears)
    assert collector.tokens_read(shared) == (batches or 20) * LENGTH
    assert collector.take(shared).second_moments.count == len(probed) * LENGTH


@pytest.mark.parametrize(("strength", "runs"), [(1.0, 2 * 4), (0.0, 0)])
def test_attention_runs_again_where_it_is_aligned(tmp_path, monkeypatch, strength, runs):
    model = make_model(tmp_path)
    names = []
    real = weighted_tokens.weighted_inputs
    monkeypatch.setattr(
        weighted_tokens,
        "weighted_inputs",
        lambda module, *args: names.append(type(module).__name__) or real(module, *args),
    )
    recipe = CATModifier(alignment_strength=strength)
    oneshot(model=model, recipe=recipe, dataset=make_loader(make_tokens(batches=4)))
    assert names == ["LlamaAttention"] * runs
