# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
from torch.nn import Linear
from transformers import BartConfig, BartForConditionalGeneration, T5Config
from transformers import T5ForConditionalGeneration as T5

from cat_modifier.calibration.padding import PaddingMasks

SIZES = {"vocab_size": 99, "pad_token_id": 0, "decoder_start_token_id": 1}
BART = BartConfig(
    **SIZES,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
SMALL_T5 = T5Config(**SIZES, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)


def count_tokens(model, **batch) -> dict[str, int]:
    """Real tokens of the input of each Linear"""
    masks, counts, handles = PaddingMasks(model), {}, []

    def note(name, module, args, kwargs):
        masks.note(name, kwargs, 0)

    def count(name, linear, inputs):
        counts[name] = masks.count(name, 0, inputs[0])

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            handles.append(module.register_forward_pre_hook(partial(count, name)))
        else:
            hook = partial(note, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**batch, use_cache=False)
    return counts


@pytest.mark.parametrize("decoder_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(
    ("model", "reads_encoder"),
    [
        (BartForConditionalGeneration(BART), "decoder.layers.0.encoder_attn.{}_proj"),
        (T5(SMALL_T5), "decoder.block.0.layer.1.EncDecAttention.{}"),
    ],
    ids=["bart", "t5"],
)
def test_encoder_and_decoder_have_padding_of_their_own(model, reads_encoder, decoder_mask):
    """Both are 16 tokens long, and the encoder has 5, the decoder 9 or 16 that are real"""
    tokens = torch.randint(2, 99, (1, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "decoder_input_ids": tokens}
    batch["attention_mask"] = (torch.arange(16) < 5).long()[None]
    real = 16
    if decoder_mask:
        batch["decoder_attention_mask"], real = (torch.arange(16) < 9).long()[None], 9
    counts = count_tokens(model.eval(), **batch)
    of_encoder = [reads_encoder.format(name) for name in "kv"]
    assert len(counts) > 10
    for name, found in counts.items():
        in_encoder = ".encoder." in f".{name}" or name.endswith(tuple(of_encoder))
        assert found == (5 if in_encoder else real), name


def test_masks_of_the_data_count_more_than_those_of_layers():
    masks, real = PaddingMasks(torch.nn.Identity()), torch.tensor([[1, 1, 0]])
    masks.note("", {"attention_mask": real}, 0)
    masks.note("layer", {"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, 0)
    masks.note("layer", {"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, 1)
    assert torch.equal(masks.of("layer", 0), real.bool())
    x = torch.zeros(1, 3, 8)
    assert [masks.count("layer", batch, x) for batch in (0, 1, 2)] == [2, 3, 3]
    # tokens that are routed to an expert
    assert masks.count("layer", 0, x[:, :2]) == 2
