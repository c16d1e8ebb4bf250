# SPDX-License-Identifier: Apache-2.0
"""
The golden checkpoint with one thing wrong, for every thing: tensors, fields of the config,
files. A loader computes what it did before, or its error names the part; what remains,
`cat-modifier verify` finds.

    python tests/mutations.py transformers      in the compress environment: prints the table
    python tests/mutations.py vllm              in the serve environment
"""

import argparse
import gc
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cat_modifier.checkpoint.verify import find_damage, write_sums

GOLDEN = Path(__file__).parent / "checkpoint" / "golden"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

OUTCOMES = {
    "same": "computes what it did",
    "named": "an error that names the part",
    "library": "an error of the library's own",
    "verify": "found by `cat-modifier verify` alone",
    "obscure": "an error that does not name the part",
    "wrong": "silently wrong",
}


class Checkpoint:
    """
    The content of a checkpoint of two shards.

    :param folder: of a checkpoint in one file
    """

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        self.shards = [
            {name: tensors[name] for name in part}
            for part in (names[: len(names) // 2], names[len(names) // 2 :])
        ]

    @property
    def names(self) -> list[str]:
        return sorted(name for shard in self.shards for name in shard)

    def shard_of(self, name: str) -> dict[str, torch.Tensor]:
        return next(shard for shard in self.shards if name in shard)

    def write(self, folder: Path):
        """Write config, shards and their index"""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        weight_map: dict[str, str] = {}
        for file, shard in zip(SHARDS, self.shards, strict=True):
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))


@dataclass
class Mutation:
    """
    One change of a checkpoint.

    :param kind: what is done
    :param part: tensor, field or file to which it is done
    :param names: what an error must name: a pattern
    :param change: does it to the content
    :param change_files: does it to the folder
    :param needs_verify: whether loaders may take the checkpoint for a good one
    :param library: pattern of an error before this package is asked
    """

    kind: str
    part: str
    names: str
    change: Callable[[Checkpoint], None] | None = None
    change_files: Callable[[Path], None] | None = None
    needs_verify: bool = False
    library: str = "(?!)"

    def __str__(self) -> str:
        return f"{self.kind}: {self.part}"

    def write(self, folder: Path):
        """Write the changed checkpoint, with the digests of the unchanged one"""
        checkpoint = Checkpoint(GOLDEN)
        checkpoint.write(folder)
        write_sums(folder)
        if self.change is not None:
            self.change(checkpoint)
            checkpoint.write(folder)
        if self.change_files is not None:
            self.change_files(folder)


def mutations() -> Iterator[Mutation]:
    """List all mutations"""
    checkpoint = Checkpoint(GOLDEN)
    for name in checkpoint.names:
        yield from _of_tensor(name, checkpoint.shard_of(name)[name])
    for path in _leaves(checkpoint.config["quantization_config"]):
        yield from _of_field(("quantization_config", *path))
    rest = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    for path in _leaves(rest):
        yield from _of_field(path)
    yield from _of_files()


def few_mutations() -> list[Mutation]:
    """List mutations of most kinds and of each kind of part"""
    by_part: dict[tuple, Mutation] = {}
    for one in mutations():
        if one.kind in (
            "field of the model removed",
            "field of the model doubled",
            "field of the model halved",
        ) or any(
            f".{name}." in one.part for name in ("v_proj", "o_proj", "gate_proj", "up_proj")
        ):
            continue
        parts = [part for part in one.part.split(".") if not part.isdigit()]
        part = (parts[-1],) if one.kind.startswith("field ") else tuple(parts)
        by_part.setdefault((one.kind, part), one)
    return list(by_part.values())


def _of_tensor(name: str, tensor: torch.Tensor) -> Iterator[Mutation]:
    def missing(checkpoint: Checkpoint):
        del checkpoint.shard_of(name)[name]

    def misshapen(checkpoint: Checkpoint):
        checkpoint.shard_of(name)[name] = tensor[:-1].contiguous()

    def flipped(checkpoint: Checkpoint):
        # the sign of the first element, or the highest bit of an integer
        bits = checkpoint.shard_of(name)[name].view(torch.uint8).view(-1)
        bits[tensor.itemsize - 1] ^= 1 << 7

    def not_finite(checkpoint: Checkpoint):
        values = checkpoint.shard_of(name)[name].view(-1)
        values[0] = torch.nan if values.is_floating_point() else -128

    names = _names_of(name)
    is_checked = ".cat_input." in name or name.endswith("_scale")
    yield Mutation("tensor missing", name, names, missing)
    yield Mutation("tensor of one row less", name, names, misshapen)
    yield Mutation("bit flipped", name, names, flipped, needs_verify=not is_checked)
    if is_checked:
        yield Mutation("value not finite", name, names, not_finite)


def _names_of(tensor: str) -> str:
    """Make a pattern for a tensor's name, or for that of the layer that vLLM merges it into"""
    module, _, kind = tensor.rpartition(".")
    parent, _, last = module.removesuffix(".cat_input").rpartition(".")
    names = [module]
    names += [f"{parent}.{merged}" for merged, parts in MERGED.items() if last in parts]
    return f"({'|'.join(map(re.escape, names))}).*{re.escape(kind)}"


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """List the paths of all values that are no objects, lists or digests"""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "sha256":
                yield from _leaves(part, (*path, key))
    else:
        yield path


def _of_field(path: tuple) -> Iterator[Mutation]:
    """
    :param path: keys of a value in config.json
    """
    is_ours = path[0] == "quantization_config"
    where = "field" if is_ours else "field of the model"
    value = Checkpoint(GOLDEN).config
    for key in path:
        value = value[key]

    def mutation(what: str, *new: Any) -> Mutation:
        def change(checkpoint: Checkpoint):
            found = checkpoint.config
            for key in path[:-1]:
                found = found[key]
            if new:
                found[path[-1]] = new[0]
            else:
                del found[path[-1]]

        names = {str(path[1])} if is_ours else {str(path[0]), str(path[-1]), *map(str, new)}
        return Mutation(
            f"{where} {what}",
            ".".join(map(str, path[1:] if is_ours else path)),
            "|".join(map(re.escape, names)) if is_ours else f"{_words(names)}|{_MISFITS}",
            change,
            # of these, readers check what decides the shape of a tensor. Transformers warns
            # of a quantization method that it does not know, and loads without it
            needs_verify=not is_ours or path[1:] == ("quant_method",),
            # of a head size, by vLLM when the model runs first
            library="Unsupported CPU attention configuration: head_dim",
        )

    yield mutation("removed")
    if isinstance(value, bool) or value is None:
        yield mutation("changed", not value)
    elif isinstance(value, int):
        yield mutation("changed", value + 1)
        if not is_ours:
            yield mutation("doubled", 2 * value)
            if value > 1:
                yield mutation("halved", value // 2)
    elif isinstance(value, float):
        yield mutation("changed", value * 0.99)
    else:
        yield mutation("changed", f"{value}x")


_MISFITS = (
    r"\w+(\.\w+)+ (has shape|does not fit|is missing|has \d+ inputs)"
    r"|config\.json is (damaged|not that)|num_kv_heads|not initialized from checkpoint"
)
"""What is said of a tensor that does not fit the model, or of a model that cannot be made;
vLLM's name of num_key_value_heads"""


def _words(names: set[str]) -> str:
    return "|".join(rf"\b{re.escape(name)}\b" for name in names if len(name) > 1)


def _of_files() -> Iterator[Mutation]:
    def remove(folder: Path, file: str):
        (folder / file).unlink()

    def truncate(folder: Path, file: str):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    def break_header(folder: Path, file: str):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(b"\xff" * 8 + content[8:])

    def empty(folder: Path, file: str):
        (folder / file).write_bytes(b"")

    for kind, action in (
        ("file missing", remove),
        ("half a file", truncate),
        ("file with a broken beginning", break_header),
        ("empty file", empty),
    ):
        for file in (*SHARDS, INDEX, "config.json"):
            yield Mutation(
                kind,
                file,
                f"{re.escape(file)}|cat-modifier verify",
                change_files=lambda folder, action=action, file=file: action(folder, file),
                # the index is read before this package is asked
                library="no file named model.safetensors|Unterminated string|Expecting value|"
                "can't decode byte",
            )


def outcomes(
    run: Callable[[Path], Any], changes: Iterable[Mutation]
) -> Iterator[tuple[Mutation, str, str]]:
    """
    Load mutated checkpoints.

    :param run: loads a checkpoint and computes something with it
    :return: mutation, outcome (a key of ``OUTCOMES``), and text of the error
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        Checkpoint(GOLDEN).write(folder)
        expected = run(folder)
        assert run(folder) == expected
        for one in changes:
            shutil.rmtree(folder)
            one.write(folder)
            yield one, *_outcome(one, folder, run, expected)


def _outcome(
    one: Mutation, folder: Path, run: Callable[[Path], Any], expected: Any
) -> tuple[str, str]:
    try:
        if run(folder) == expected:
            return "same", ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if re.search(one.names, text, re.DOTALL):
            return "named", text
        return "library" if re.search(one.library, text) else "obscure", text
    return "verify" if one.needs_verify and find_damage(folder) else "wrong", ""


# ---- loaders -----------------------------------------------------------------------------


def golden_tokens() -> list[list[int]]:
    return json.loads((GOLDEN / "reference.json").read_text())["ids"]


@torch.no_grad()
def run_transformers(folder: Path) -> list:
    from transformers import AutoModelForCausalLM

    import cat_modifier  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor(golden_tokens())).logits.tolist()


def run_vllm(folder: Path) -> list:
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    flags = {"enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True}
    llm = None
    try:
        llm = LLM(str(folder), dtype="float32", **sizes, **flags)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in golden_tokens()]
        return [
            [
                entry[token].logprob
                for token, entry in zip(
                    output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                )
            ]
            for output in llm.generate(prompts, params, use_tqdm=False)
        ]
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def table(found: Iterable[tuple[Mutation, str, str]]) -> str:
    """Count the outcomes by kind of mutation, in Markdown"""
    counts = Counter((one.kind, outcome) for one, outcome, _ in found)
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    lines = [f"| | {' | '.join(OUTCOMES.values())} |", f"|---|{'---:|' * len(OUTCOMES)}"]
    for kind in kinds:
        row = [str(counts[kind, outcome]) for outcome in OUTCOMES]
        lines.append(f"| {kind} | {' | '.join(row)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("loader", choices=["transformers", "vllm"])
    parser.add_argument("--few", action="store_true", help="one mutation of each kind of part")
    parser.add_argument("--only", default="", help="mutations with this text")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    arguments = parser.parse_args()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    run = {"transformers": run_transformers, "vllm": run_vllm}[arguments.loader]
    changes = few_mutations() if arguments.few else list(mutations())
    changes = [one for one in changes if arguments.only in str(one)]
    found = []
    for one, outcome, text in outcomes(run, changes):
        found.append((one, outcome, text))
        if outcome in ("obscure", "wrong"):
            print(f"{outcome}: {one}: {text}", flush=True)
    print(table(found))
    if arguments.json:
        content = [[str(one), outcome, text] for one, outcome, text in found]
        arguments.json.write_text(json.dumps(content, indent=1))
    sys.stdout.flush()
    # vLLM's threads would keep the process
    os._exit(0)


if __name__ == "__main__":
    main()
