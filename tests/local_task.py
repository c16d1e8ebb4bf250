# SPDX-License-Identifier: Apache-2.0
"""A task of lm-eval in a folder, with words of the tiny models"""

import json
import random
from pathlib import Path

from tiny_models import VOCABULARY

TASK = """
task: words
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


def write_task(folder: Path):
    """Write the task `words`: 12 questions of four choices"""
    folder.mkdir()
    random.seed(0)

    def words(count: int) -> list[str]:
        return [f"<{random.randrange(2, VOCABULARY)}>" for _ in range(count)]

    rows = [
        {"question": " ".join(words(8)), "choices": words(4), "answer": random.randrange(4)}
        for _ in range(12)
    ]
    file = folder / "words.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.yaml").write_text(TASK.replace("FILE", json.dumps(str(file))))
