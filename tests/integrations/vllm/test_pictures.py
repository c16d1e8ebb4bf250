# SPDX-License-Identifier: Apache-2.0
"""A vision-language model with pictures, in real vLLM and in Transformers"""

import numpy as np
import pytest
import torch
from conftest import serve, sqnr_db
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import cat_modifier  # noqa: F401

IMAGE = 5


@pytest.mark.parametrize(
    "family, dtype, least",
    # vLLM's gated delta rule for CPUs has no other type, in which integers round the other way
    [("qwen2_5_vl", "float32", 25), ("qwen3_5", "bfloat16", 17)],
)
@torch.no_grad()
def test_pictures_are_seen_as_in_transformers(checkpoints, tmp_path, family, dtype, least):
    folder = checkpoints / f"{family}-w4a8"
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    generator = np.random.default_rng(0)
    prompts, expected, without = [], [], []
    for index in range(3):
        file = tmp_path / f"{index}.png"
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        words = [f"<{token}>" for token in generator.integers(8, 128, 20)]
        text = " ".join(["<3> <5> <4>", *words])
        prompts.append({"prompt": text, "image": str(file)})
        inputs = processor(images=Image.open(file), text=text, return_tensors="pt")
        expected.append(text_logprobs(model, inputs))
        inputs["pixel_values"] = -inputs["pixel_values"]
        without.append(text_logprobs(model, inputs))
    options = {"dtype": dtype, "limit_mm_per_prompt": {"image": 1}}
    result = serve(folder, [], options=options, prompts=prompts, skip_token=IMAGE)
    assert not result["error"], result["log"]
    found = torch.tensor(result["logprobs"])
    sqnr = sqnr_db(found, torch.stack(expected))
    assert sqnr > least, f"{sqnr:.1f} dB"
    assert sqnr_db(found, torch.stack(without)) < 10


def text_logprobs(model, inputs) -> torch.Tensor:
    """Log-probabilities of all tokens but pictures"""
    ids = inputs["input_ids"][0, 1:, None]
    logits = model(**inputs).logits[0, :-1].float()
    logprobs = logits.log_softmax(-1).gather(1, ids)
    return logprobs[ids != IMAGE]
