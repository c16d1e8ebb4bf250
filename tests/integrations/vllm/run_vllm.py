# SPDX-License-Identifier: Apache-2.0
"""
Run vLLM once, in a process of its own, and write what it computed to a JSON file.

    python run_vllm.py '{"model": ..., "ids": [[...]], "options": {...}}' FILE
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torch._dynamo.utils import get_compilation_metrics
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def count_compiled_kernels() -> int:
    """Count compiled kernels of this package, without those of vLLM"""
    return sum("cat_modifier" in (one.co_filename or "") for one in get_compilation_metrics())


def main(job: dict, file: Path):
    options = {
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    llm = LLM(job["model"], **(options | job["options"]))
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        # vLLM caches a prompt only if no logprobs of its tokens are requested
        prompt_logprobs=None if job.get("first_token_only") else 0,
        logprobs=0,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["ids"]]
    for one in job.get("speech", ()):
        speech = {"audio": (np.load(one["audio"]), one["sampling_rate"])}
        prompts.append(
            {
                "encoder_prompt": {"prompt": "", "multi_modal_data": speech},
                "decoder_prompt": {"prompt_token_ids": one["ids"]},
            }
        )
    for one in job.get("prompts", ()):
        picture = Image.open(one["image"])
        prompts.append({"prompt": one["prompt"], "multi_modal_data": {"image": picture}})
    if "task" in job:
        if job["task"] == "embed":
            values = [one.outputs.embedding for one in llm.embed(prompts, use_tqdm=False)]
        else:
            values = [one.outputs.probs for one in llm.classify(prompts, use_tqdm=False)]
        file.write_text(json.dumps({"values": values}))
        os._exit(0)
    adapter = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
    compiled_in_advance = count_compiled_kernels()
    if "reload" in job:
        llm.generate(prompts, params, use_tqdm=False)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
    for _ in range(job.get("repeat", 1)):
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
    result = {
        "quantization": llm.llm_engine.model_config.quantization,
        "compiled_by_requests": count_compiled_kernels() - compiled_in_advance,
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        "first_tokens": [output.outputs[0].token_ids[0] for output in outputs],
        "first_logprobs": [output.outputs[0].cumulative_logprob for output in outputs],
        "logprobs": [
            [
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
                if token != job.get("skip_token")
            ]
            for output in outputs
            if output.prompt_logprobs
        ],
    }
    file.write_text(json.dumps(result))
    # with several ranks the interpreter would abort when it shuts down
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
