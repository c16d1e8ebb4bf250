# SPDX-License-Identifier: Apache-2.0
"""
What the processes of families.py share. They leave a result in a file whatever happens to them.
"""

import json
import os
import re
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from transformers import PreTrainedConfig

LIBRARIES = {
    "cat_modifier": "ours",
    "llmcompressor": "llm-compressor",
    "compressed_tensors": "compressed-tensors",
    "transformers": "Transformers",
    "vllm": "vLLM",
}


def served_in_bfloat16(config: PreTrainedConfig) -> bool:
    """Whether vLLM's attention for CPUs has only bfloat16, as its gated delta rule"""
    return hasattr(config.get_text_config(), "linear_num_key_heads")


def relative_error(found: list, expected: list) -> float:
    """Relative error of nested lists of numbers"""
    a, b = torch.tensor(found).double(), torch.tensor(expected).double()
    return ((a - b).norm() / b.norm()).item()


def wait(process: BaseProcess, file: Path, limit: int) -> dict:
    """
    Run a process to its end, or kill it.

    :param file: receives its result
    :param limit: seconds
    :return: the result, with an error if the process did not end by itself
    """
    file.unlink(missing_ok=True)
    process.start()
    process.join(limit)
    ended = f"The process ended with {process.exitcode}"
    if process.is_alive():
        process.kill()
        process.join()
        ended = f"Not done after {limit} s"
    result = json.loads(file.read_text()) if file.exists() else {}
    if process.exitcode != 0:
        result["error"] = {"kind": "Process", "sentence": ended, "library": "", "where": ""}
    return result


def redirect_output(log: Path):
    """Let this process and all libraries in it print to a file"""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def describe(error: BaseException) -> dict[str, str]:
    """
    :return: the error's first sentence, the library in whose code it was raised, and where
    """
    sentence = " ".join(str(error).split()) or type(error).__name__
    sentence = re.split(r"(?<=[a-z)\]'])\. ", sentence)[0]
    sentence = re.sub(r"/\S*/", "", sentence)
    frames = traceback.extract_tb(error.__traceback__)
    libraries = [
        library
        for frame in frames
        for package, library in LIBRARIES.items()
        if f"/{package}/" in frame.filename
        # attributes are looked up by one library, and asked for by another
        and frame.name not in ("__getattr__", "__getattribute__")
    ]
    return {
        "kind": type(error).__name__,
        "sentence": sentence[:300],
        "library": libraries[-1] if libraries else "",
        "where": f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "",
    }
