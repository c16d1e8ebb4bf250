# SPDX-License-Identifier: Apache-2.0
"""
Serve checkpoints of families.py with vLLM, each in a process of its own, and compare what it
computes with reference.json beside the checkpoint. Runs in the serve environment; families.py
starts it, and sends a line of JSON for each checkpoint.
"""

import importlib
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

from family_process import (
    describe,
    redirect_output,
    relative_error,
    served_in_bfloat16,
    wait,
)
from transformers import AutoConfig, PreTrainedConfig

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
}


def options_of(config: PreTrainedConfig) -> dict:
    """Options that vLLM for CPUs needs for a model, with any checkpoint"""
    text = config.get_text_config()
    options = dict(OPTIONS)
    if served_in_bfloat16(config):
        options["dtype"] = "bfloat16"
    if getattr(text, "kv_lora_rank", None):
        # its rotary operator is wrong for latent attention
        options["compilation_config"] = {"custom_ops": ["none"]}
    return options


def serve(model: Path, reference: dict) -> list:
    from vllm import LLM, SamplingParams

    options = options_of(AutoConfig.from_pretrained(model))
    prompts = [{"prompt_token_ids": ids} for ids in reference["ids"]]
    if reference["task"] == "generate":
        text_alone = {"language_model_only": True} if reference["has_pictures"] else {}
        llm = LLM(str(model), **options, **text_alone)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, logprobs=0)
        return [
            [
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in llm.generate(prompts, params, use_tqdm=False)
        ]
    llm = LLM(str(model), **options, runner="pooling")
    if reference["task"] == "classify":
        return [one.outputs.probs for one in llm.classify(prompts, use_tqdm=False)]
    return [one.outputs.embedding for one in llm.embed(prompts, use_tqdm=False)]


def serve_and_compare(model: Path, file: Path):
    """
    :param model: folder of a checkpoint
    :param file: receives the result
    """
    redirect_output(file.with_suffix(".log"))
    reference = json.loads((model / "reference.json").read_text())
    result: dict = {}
    try:
        from vllm import ModelRegistry

        architecture = json.loads((model / "config.json").read_text())["architectures"][0]
        # vLLM makes these from decoders
        is_adapted = architecture.endswith(("ForSequenceClassification", "Model"))
        if not is_adapted and architecture not in ModelRegistry.get_supported_archs():
            file.write_text(json.dumps({"unsupported": architecture}))
            os._exit(0)
        result["served"] = relative_error(serve(model, reference), reference["values"])
    except Exception as error:
        result["error"] = describe(error)
        traceback.print_exc()
    file.write_text(json.dumps(result))
    # the engine would wait for its threads
    sys.stdout.flush()
    os._exit(0)


def main():
    # vLLM is imported once, by the process that the others are forked from
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"]
    )
    for line in sys.stdin:
        job = json.loads(line)
        file = Path(job["file"])
        process = processes.Process(target=start, args=(Path(job["model"]), file))
        print(json.dumps(wait(process, file, job["limit"])), flush=True)


def start(model: Path, file: Path):
    # by its name: __main__ of this process imports no vLLM
    importlib.import_module("family_serve").serve_and_compare(model, file)


if __name__ == "__main__":
    main()
