# SPDX-License-Identifier: Apache-2.0
"""
Serve checkpoints on a GPU and compare their log-probabilities with those of Transformers.

    python tests/integrations/vllm/run_gpu.py FOLDER [--logs FOLDER] [--only NAME ...]

FOLDER is made by `make_gpu_models.py`: checkpoints, each with `reference.json`: token ids,
their log-probabilities in float32, and the SQNR that Transformers has in float16 (`half_db`).
One process serves each checkpoint in each mode; several run at a time.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

MODES = {
    "eager": {"enforce_eager": True},
    # as vLLM serves by default: torch.compile and CUDA graphs
    "compiled": {"enforce_eager": False, "cudagraph_capture_sizes": [1, 2, 4, 8]},
    # CUDA graphs of the model as it is
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
    },
}

COMMON = {
    "max_model_len": 512,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "dtype": "float16",
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**28,
}

GENERATED = 24


def serve(model: str, mode: str, options: dict):
    """The process of one checkpoint: prints what it computed"""
    from vllm import LLM, SamplingParams

    reference = json.loads((Path(model) / "reference.json").read_text())
    options = COMMON | MODES[mode] | options
    if not reference["is_cat"] and reference["needs_kernels"]:
        options["quantization"] = "cat-modifier"
    start = time.perf_counter()
    llm = LLM(model, **options)
    seconds = time.perf_counter() - start
    prompts = [{"prompt_token_ids": ids} for ids in reference["ids"]]
    scores = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = [
        [
            entry[token].logprob
            for token, entry in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
        for output in llm.generate(prompts, scores, use_tqdm=False)
    ]
    # decoding, one token after the other: the log-probabilities of its own tokens, again as a
    # prompt's
    params = SamplingParams(
        temperature=0, max_tokens=GENERATED, logprobs=0, ignore_eos=True, detokenize=False
    )
    short = [{"prompt_token_ids": ids[:40]} for ids in reference["ids"]]
    decoded, again = [], []
    for output in llm.generate(short, params, use_tqdm=False):
        step = output.outputs[0]
        decoded.append(
            [one[t].logprob for t, one in zip(step.token_ids, step.logprobs, strict=True)]
        )
        again.append({"prompt_token_ids": [*output.prompt_token_ids, *step.token_ids]})
    prefilled = [
        [
            entry[token].logprob
            for token, entry in zip(
                output.prompt_token_ids[-GENERATED:],
                output.prompt_logprobs[-GENERATED:],
                strict=True,
            )
        ]
        for output in llm.generate(again, scores, use_tqdm=False)
    ]
    result = {
        "logprobs": found,
        "decoded": decoded,
        "prefilled": prefilled,
        "start": seconds,
        "quantization": llm.llm_engine.model_config.quantization,
    }
    print(f"\nresult {json.dumps(result)}", flush=True)
    os._exit(0)


def sqnr_db(found, expected) -> float:
    found, expected = torch.tensor(found), torch.tensor(expected)
    noise = (found - expected).var().item()
    return 10 * math.log10(expected.var().item() / noise) if noise else math.inf


def run(folder: Path, mode: str, logs: Path, options: dict, timeout: float) -> str:
    log = logs / f"{folder.name}-{mode}.log"
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, __file__, str(folder), "--serve", mode, json.dumps(options)]
    try:
        with log.open("w") as file:
            subprocess.run(
                command,
                env=environment | os.environ,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
    except subprocess.TimeoutExpired:
        return f"FAILED {folder.name:20} {mode:9} took more than {timeout} s"
    text = log.read_text()
    match = re.search(r"^result (.*)$", text, re.MULTILINE)
    if match is None:
        errors = [line for line in text.splitlines() if re.search(r"\w*(Error|rror:)", line)]
        return f"FAILED {folder.name:20} {mode:9} {(errors or ['no result'])[-1][-200:]}"
    result = json.loads(match[1])
    reference = json.loads((folder / "reference.json").read_text())
    kernels = sorted(set(re.findall(r"Using (\w*(?:Kernel|Linear\w*))", text)))
    backend = re.findall(r"Using (\w+) (?:attention )?backend", text)
    difference = torch.tensor(result["logprobs"]) - torch.tensor(reference["logprobs"])
    decode = torch.tensor(result["decoded"]) - torch.tensor(result["prefilled"])
    return (
        f"ok     {folder.name:20} {mode:9} "
        f"SQNR {sqnr_db(result['logprobs'], reference['logprobs']):5.1f} dB "
        f"(float16 in Transformers {reference['half_db']:5.1f}) "
        f"mean {difference.mean():+.4f} largest {difference.abs().max():.3f}; "
        f"decode to prefill: {sqnr_db(result['decoded'], result['prefilled']):5.1f} dB "
        f"largest {decode.abs().max():.3f}; "
        f"{result['quantization']} {kernels} {backend[:1]} start {result['start']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--only", nargs="+", help="names of checkpoints")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--parallel", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=150, help="seconds of each")
    parser.add_argument("--options", type=json.loads, default={}, help="of vLLM, JSON")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(str(args.folder), args.serve[0], json.loads(args.serve[1]))
    logs = args.logs or args.folder
    logs.mkdir(parents=True, exist_ok=True)
    folders = sorted(file.parent for file in args.folder.glob("*/reference.json"))
    jobs = [
        (folder, mode)
        for mode in args.modes
        for folder in folders
        if not args.only or folder.name in args.only
    ]
    with ThreadPoolExecutor(args.parallel) as pool:
        done = pool.map(lambda job: run(*job, logs, args.options, args.timeout), jobs)
        for line in done:
            print(line, flush=True)


if __name__ == "__main__":
    main()
