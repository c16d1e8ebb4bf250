# SPDX-License-Identifier: Apache-2.0
"""Texts that every Python installation has"""

from cat_modifier.calibration.texts import EMBEDDED, MIXED, load_texts


def test_the_halves_share_no_text():
    train, test = (load_texts(MIXED, split) for split in ("train", "test"))
    assert len(train) > 20 and len(test) > 20
    assert set(train).isdisjoint(test)


def test_kinds_alternate():
    topics = {text[:100] for text in load_texts(EMBEDDED, "train")}
    texts = load_texts(MIXED, "train")
    assert all(text[:100] in topics for text in texts[::4])
    assert sum(text[:100] in topics for text in texts) == len(texts) / 4
    assert max(map(len, texts)) <= 6000
    assert sum("import " in text for text in texts[3::4]) > len(texts) / 8
