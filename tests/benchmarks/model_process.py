# SPDX-License-Identifier: Apache-2.0
"""
Processes that each hold one model of vLLM, and are asked for times in turn: the machine's
changes of speed then meet all of them.

A script starts itself as the process. Questions and answers are lines of text.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

_MARK = "answer "
"""Starts the lines that are answers: vLLM prints others"""


class ModelProcess:
    """
    A process of one model, seen from outside.

    :param command: script and arguments, to be run by this Python
    :param log: file for what the process prints
    :param environment: variables that are set unless the user has set them
    """

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]):
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        self.log = log
        log.write_text("")
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            env={**defaults, **environment, **os.environ},
            text=True,
        )

    def ask(self, question: str) -> Any:
        """Ask, and wait for the answer: see :meth:`answer`"""
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """
        Wait for an answer. The first one needs no question: the facts of the model.

        :raises RuntimeError: if the process has ended
        """
        with self.log.open("a") as log:
            for line in self._process.stdout:
                if line.startswith(_MARK):
                    return json.loads(line.removeprefix(_MARK))
                log.write(line)
        raise RuntimeError(f"vLLM stopped: see {self.log}")

    def close(self):
        """End the process"""
        self._process.stdin.close()
        self._process.wait()


def answer_questions(facts: Mapping[str, Any], measure: Callable[[str], float]) -> NoReturn:
    """
    Answer questions until the other side closes, and end the process.

    :param facts: the first answer
    :param measure: computes the answer to a question
    """
    answer: Any = facts
    while True:
        print(f"\n{_MARK}{json.dumps(answer)}", flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            os._exit(0)  # engines of vLLM may wait for each other
        answer = measure(question)


def time_generation(
    llm: Any, count: int, length: int, tokens: int, clock: Callable[[], float]
) -> float:
    """
    Measure how long a model takes to generate.

    :param llm: ``vllm.LLM``
    :param count: number of prompts
    :param length: tokens of each prompt
    :param tokens: tokens to generate for each prompt
    :param clock: tells the time, seconds
    """
    import torch
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (count, length), generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]
    start = clock()
    llm.generate(prompts, params, use_tqdm=False)
    return clock() - start


def start_model(**options: Any) -> tuple[Any, float]:
    """
    Start vLLM without what would disturb a measurement.

    :param options: of ``vllm.LLM``
    :return: the model, and the seconds that its start took
    """
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(
        **options,
        dtype="bfloat16",
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    return llm, time.perf_counter() - start
