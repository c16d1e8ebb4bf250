# SPDX-License-Identifier: Apache-2.0
"""Text to calibrate and to evaluate on, as windows of tokens"""

import pydoc_data.topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

EMBEDDED = "pydoc-topics"
"""English text of the Python installation: 150 kB, no download"""


def load_texts(dataset: str, split: str, column: str = "text") -> list[str]:
    """
    :param dataset: a dataset of the Hugging Face Hub as ``id`` or ``id:configuration``, or
        ``pydoc-topics``
    :param split: of a dataset of the Hub, as in ``datasets.load_dataset``; of pydoc-topics,
        ``train`` is one half of the topics and ``test`` the other
    :param column: which holds the text
    """
    if dataset == EMBEDDED:
        topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        middle = len(topics) // 2
        return topics[:middle] if split == "train" else topics[middle:]

    from datasets import load_dataset

    name, _, configuration = dataset.partition(":")
    return list(load_dataset(name, configuration or None, split=split)[column])


def windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> Tensor:
    """
    :param texts: put one after the other
    :param length: of a window
    :param count: of windows, at most
    :return: token ids, shape (windows, length), int64, without padding
    :raises ValueError: if the texts do not fill one window
    """
    ids, end = [], length * count
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(ids) >= end:
            break
    found = min(len(ids) // length, count)
    if found == 0:
        raise ValueError(f"The texts have {len(ids)} tokens, too few for {length} of them")
    return torch.tensor(ids[: found * length]).view(found, length)
