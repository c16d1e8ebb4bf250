# SPDX-License-Identifier: Apache-2.0
"""
Run vLLM once, in a process of its own, and print what it computed as the last line.

    python tests/serve/run_vllm.py '{"model": ..., "ids": [[...]], "options": {...}}'
"""

import json
import sys

from vllm import LLM, SamplingParams


def main(job: dict):
    options = {
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    llm = LLM(job["model"], **(options | job["options"]))
    params = SamplingParams(
        temperature=0,
        max_tokens=job.get("max_tokens", 1),
        prompt_logprobs=0,
        ignore_eos=True,
    )
    if job.get("without_logprobs"):
        params.prompt_logprobs = None
    prompts = [{"prompt_token_ids": ids} for ids in job["ids"]]
    for _ in range(job.get("repeat", 1)):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    result = {
        "quantization": llm.llm_engine.model_config.quantization,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in outputs
            if output.prompt_logprobs
        ],
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
