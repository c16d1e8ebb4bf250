# SPDX-License-Identifier: Apache-2.0
"""A speech model in real vLLM and in Transformers"""

import numpy as np
import torch
from conftest import exchange_a_block, serve, sqnr_db
from tiny_models import make_tokens
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import cat_modifier  # noqa: F401

RATE = 16000


@torch.no_grad()
def test_speech_is_heard_as_in_transformers(checkpoints, tmp_path):
    folder = checkpoints / "whisper-w4a4"
    extractor = AutoProcessor.from_pretrained(folder).feature_extractor
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).eval()
    speech, expected = [], []
    for index, ids in enumerate(make_tokens(4, seed=1)):
        ids[0] = model.config.decoder_start_token_id  # else vLLM puts it first
        audio = make_tones(index)
        file = tmp_path / f"{index}.npy"
        np.save(file, audio)
        speech.append({"audio": str(file), "sampling_rate": RATE, "ids": ids.tolist()})
        inputs = extractor(audio, sampling_rate=RATE, return_tensors="pt")
        logits = model(**inputs, decoder_input_ids=ids[None]).logits[0, :-1]
        expected.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    expected = torch.stack(expected)

    def sqnr_of(folder, speech) -> float:
        result = serve(folder, [], options={"dtype": "float32"}, speech=speech)
        assert not result["error"], result["log"]
        assert "W4A4 integers" in result["log"]
        return sqnr_db(torch.tensor(result["logprobs"]), expected)

    sqnr = sqnr_of(folder, speech)
    assert sqnr > 25, f"{sqnr:.1f} dB"
    exchanged = [one | {"audio": speech[i - 1]["audio"]} for i, one in enumerate(speech)]
    assert sqnr_of(folder, exchanged) < 20
    assert sqnr_of(exchange_a_block(folder, tmp_path), speech) < 20


def make_tones(seed: int) -> np.ndarray:
    """Make a second of 8 tones"""
    frequencies = np.random.default_rng(seed).uniform(100, 7000, (8, 1))
    times = np.arange(RATE // 8) / RATE
    return np.sin(2 * np.pi * frequencies * times).ravel().astype(np.float32)
