# SPDX-License-Identifier: Apache-2.0
"""Data for the commands, of words that the tiny models know: chats, and a task of lm-eval"""

import json
import random
from pathlib import Path

import torch
from tiny_models import VOCABULARY, make_model
from transformers import AutoTokenizer

TASK = """
task: NAME
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""

TEMPLATE = "{{ bos_token }}{% for one in messages %} {{ one.content }} <3>{% endfor %}"


def make_chat_model(folder: Path, family: str = "llama", **options):
    """Make a model of bfloat16, whose tokenizer has a chat template"""
    make_model(folder, family, dtype=torch.bfloat16, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def _words(first: int, count: int) -> str:
    return " ".join(f"<{(first + i) * 7919 % VOCABULARY}>" for i in range(count))


def write_chats(file: Path):
    """Write a dataset of chats, as those for instruction tuning are"""
    rows = [
        {
            "prompt": _words(i, 20),
            "messages": [
                {"role": "user", "content": _words(i, 20)},
                {"role": "assistant", "content": _words(i + 20, 40)},
            ],
        }
        for i in range(40)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))


def write_task(folder: Path):
    """Write the task `words`: 12 questions of four choices"""
    random.seed(0)

    def words(count: int) -> list[str]:
        return [f"<{random.randrange(2, VOCABULARY)}>" for _ in range(count)]

    rows = [
        {"question": " ".join(words(8)), "choices": words(4), "answer": random.randrange(4)}
        for _ in range(12)
    ]
    save_task(folder, "words", rows)


def save_task(folder: Path, name: str, rows: list[dict]):
    """
    Write a task of lm-eval into a new folder.

    :param rows: `question`, `choices`, and the index of the right one as `answer`
    """
    folder.mkdir()
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    text = TASK.replace("NAME", name).replace("FILE", json.dumps(str(file)))
    (folder / f"{name}.yaml").write_text(text)
