# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
from torch.nn import Linear, ModuleList
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    UMT5Config,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers import T5ForConditionalGeneration as T5
from transformers import UMT5ForConditionalGeneration as UMT5

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
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
SMALL_T5, SMALL_UMT5 = T5Config(**SIZES, **T5_SIZES), UMT5Config(**SIZES, **T5_SIZES)


def count_tokens(model, holders=("",), **batch) -> dict[str, int]:
    """
    Real tokens of the input of each Linear.

    :param holders: modules that are watched, with all that are in them
    """
    masks, counts = PaddingMasks(model), {}

    def count(name, linear, inputs):
        counts[name] = masks.count(name, 0, inputs[0])

    handles = [
        module.register_forward_pre_hook(partial(count, name))
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    ]

    def note(name, module, args, kwargs):
        masks.note(name, kwargs, 0)

    for name, module in model.named_modules():
        if name.startswith(tuple(holders)):
            hook = partial(note, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("decoder_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(
    ("model", "reads_encoder"),
    [
        (BartForConditionalGeneration(BART), "decoder.layers.0.encoder_attn.{}_proj"),
        (T5(SMALL_T5), "decoder.block.0.layer.1.EncDecAttention.{}"),
        (UMT5(SMALL_UMT5), "decoder.block.0.layer.1.EncDecAttention.{}"),
    ],
    ids=["bart", "t5", "umt5"],
)
@pytest.mark.parametrize("watches_all", [True, False], ids=["model", "layers"])
def test_encoder_and_decoder_have_padding_of_their_own(
    model, reads_encoder, decoder_mask, watches_all
):
    """
    Both are 16 tokens long, and the encoder has 5, the decoder 9 or 16 that are real. Where
    llm-compressor calls a model in parts, only its layers are seen.
    """
    tokens = torch.randint(2, 99, (1, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "decoder_input_ids": tokens}
    batch["attention_mask"] = (torch.arange(16) < 5).long()[None]
    real = 16
    if decoder_mask:
        batch["decoder_attention_mask"], real = (torch.arange(16) < 9).long()[None], 9
    layers = [name for name, one in model.named_modules() if isinstance(one, ModuleList)]
    holders = [""] if watches_all else [f"{name}." for name in layers]
    counts = count_tokens(model.eval(), holders, **batch)
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


def test_an_encoder_of_sound_has_a_mask_of_frames():
    """The data have one of samples, which is of another length"""
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2ForCTC(config).eval()
    mask = (torch.arange(2000) < 1000).long()[None]
    batch = {"input_values": torch.randn(1, 2000), "attention_mask": mask}
    masks, counts = PaddingMasks(model), []

    def count(linear, inputs):
        counts.append(masks.count("wav2vec2.encoder.layers.0", 0, inputs[0]))

    query = model.wav2vec2.encoder.layers[0].attention.q_proj
    query.register_forward_pre_hook(count)
    with masks.watching(model, 0), torch.no_grad():
        model(**batch)
    frames = model._get_feat_extract_output_lengths(torch.tensor([1000, 2000])).tolist()
    assert counts == [frames[0]] and frames[0] < frames[1]


def test_counts_follow_the_mask():
    masks = PaddingMasks(torch.nn.Identity())
    for size, expected in ((4, 4), (16, 10)):
        real = torch.ones(1, 1, size, size, dtype=torch.bool)
        real[:, :, expected:] = False
        masks.note("layer", {"attention_mask": real}, 0)
        assert masks.count("layer", 0, torch.zeros(1, size, 8)) == expected
    assert masks.of("layer", 0).untyped_storage().nbytes() == 16


def test_memory_of_the_encoder_that_is_used_again():
    """By the allocator, for tokens of the decoder"""
    model = T5(SMALL_T5)
    masks, data = PaddingMasks(model), torch.zeros(1, 16, 32)
    states = data.view(1, 16, 32)
    masks.note("", {"attention_mask": (torch.arange(16) < 5).long()[None]}, 0)
    masks.note("decoder.block.0", {"encoder_hidden_states": states}, 0)
    assert masks.count("decoder.block.0.layer.1", 0, states) == 5
    del states
    assert masks.count("decoder.block.0.layer.1", 0, data) == 16
