# SPDX-License-Identifier: Apache-2.0
"""
Small random models of many architectures: transformed, quantized to W4A4 with the default
recipe, saved, read back with Transformers, and served with vLLM. Each family runs in
processes of its own, 5 to 60 s on 2 cores; families that the JSON has are not run again. Runs
in the compress environment; vLLM in the serve environment beside it.

    python tests/benchmarks/families.py --json tests/benchmarks/results/families.json
"""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from family_models import FAMILIES, families
from family_process import wait

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "families.json"
SERVE = ROOT / ".venvs" / "serve" / "bin" / "python"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that begin with what takes seconds to import, but without cat-modifier"""

SAME_FUNCTION = 1e-4
SAME_RELOADED = 1e-4
"""Relative errors of the same function in float32"""

SAME_SERVED = 1e-2
"""Relative error in vLLM, where an activation may round to the next integer"""

SAME_ROUNDED = 1.5
"""Error in vLLM relative to that of Transformers, where both compute in bfloat16"""


def call(module: str, function: str, *arguments):
    """Call a function of a module that this process does not import"""
    getattr(importlib.import_module(module), function)(*arguments)


def compress(name: str, folder: Path, limit: int, stock: str | None = None) -> dict:
    """Run family_compress in a process of its own"""
    arguments = ("family_compress", "compress", name, folder, stock)
    process = PROCESSES.Process(target=call, args=arguments)
    return wait(process, folder / "result.json", limit)


class Server:
    """family_serve in the serve environment"""

    def __init__(self):
        self._process = subprocess.Popen(
            [str(SERVE), str(HERE / "family_serve.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serve(self, folder: Path, name: str, limit: int) -> dict:
        """
        :param folder: folder of the family
        :param name: checkpoint in it
        """
        job = {"model": str(folder / name), "file": str(folder / "served"), "limit": limit}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def run_compress(name: str, folder: Path, limit: int) -> dict:
    """Compress a family, and if that fails see how it is without cat-modifier"""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entry = compress(name, folder, limit)
    if not is_good(entry):
        entry["stock"] = compress(name, folder, limit, "W4A4")
        if is_good(entry["stock"]) and entry["step"] in ("transform", "quantize"):
            # does llm-compressor get data through the model?
            entry["stock calibrated"] = compress(name, folder, limit, "calibrated W4A4")
    return entry


def run_serve(server: Server, name: str, entry: dict, folder: Path, limit: int) -> dict:
    """Serve a family, and if that fails see how its original and W8A8 are served"""
    if not (folder / "ours" / "reference.json").exists():
        return {}
    result = server.serve(folder, "ours", limit)
    if "bfloat16" in entry:
        result["bfloat16"] = entry["bfloat16"]
    if not is_served(result) and "unsupported" not in result:
        result["original"] = server.serve(folder, "original", limit)
        if is_served(result["original"]):
            result["stock"] = compress(name, folder, limit, "W8A8")
            if "error" not in result["stock"] or result["stock"]["step"] == "reload":
                result["stock"] = server.serve(folder, "stock-W8A8", limit)
    return result


def is_good(result: dict) -> bool:
    return (
        "error" not in result
        and result.get("function", 0) < SAME_FUNCTION
        and result["reload"] < SAME_RELOADED
    )


def is_served(result: dict) -> bool:
    most = max(SAME_SERVED, SAME_ROUNDED * result.get("bfloat16", 0))
    return result.get("served", math.inf) < most


def whose_limit(entry: dict) -> str:
    """Name whose limits a family meets: upstream's if it fails without us, too"""
    served = entry.get("vllm", {})
    of_serving = ""
    if "original" in served:
        others = [served["original"], served.get("stock", {})]
        if "error" in served:
            is_ours = all("served" in one for one in others)
        else:
            is_ours = all(is_served(one) for one in others)
        of_serving = "ours (in vLLM)" if is_ours else "vLLM"
    limits = [_whose_limit_before_vllm(entry), of_serving]
    return ", ".join(limit for limit in limits if limit)


def _whose_limit_before_vllm(entry: dict) -> str:
    if is_good(entry):
        return ""
    if entry["step"] == "make":
        return "this benchmark"
    stock = entry["stock"]
    if is_good(stock):
        error = entry.get("stock calibrated", {}).get("error")
        return error["library"] if error else "ours"
    if entry.get("function", 0) >= SAME_FUNCTION:
        return "ours"
    if entry["step"] in ("transform", "quantize") and stock["step"] in ("reload", "done"):
        return "ours"
    if "error" in stock:
        return stock["error"]["library"] or "llm-compressor"
    # it is read, and computes something else
    return "Transformers"


def decibels(error: float) -> str:
    return "exact" if error == 0 else f"{-20 * math.log10(error):.0f} dB"


def serving(served: dict) -> str:
    if "served" not in served:
        return ""
    rounded = f" ({decibels(served['bfloat16'])})" if "bfloat16" in served else ""
    return decibels(served["served"]) + rounded


def table(entries: dict[str, dict]) -> str:
    """Markdown, a row for each family"""
    lines = [
        "| family | Linears transformed | function | reload | vLLM | note | whose limit |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for name, entry in entries.items():
        count = "transformed" in entry
        served = entry.get("vllm", {})
        cells = [
            name,
            f"{entry['transformed']} of {entry['linears']}" if count else "",
            f"{entry['function']:.0e}" if "function" in entry else "",
            decibels(entry["reload"]) if "reload" in entry else "",
            serving(served),
            note(entry),
            whose_limit(entry),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counts(entries: dict[str, dict]) -> str:
    """Markdown, a row for each kind of model"""
    lines = [
        "| kind | families | function | reload | vLLM | less exactly | error in vLLM "
        "| not served |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, names_of in FAMILIES.items():
        names = [name for names in names_of.values() for name in names.split()]
        found = [entries[name] for name in names if name in entries]
        served = [entry.get("vllm", {}) for entry in found]
        same = sum(is_served(one) for one in served)
        ran, failed = (sum(key in one for one in served) for key in ("served", "error"))
        numbers = [
            len(found),
            sum(entry.get("function", math.inf) < SAME_FUNCTION for entry in found),
            sum(map(is_good, found)),
            same,
            ran - same,
            failed,
            len(found) - ran - failed,
        ]
        lines.append("| " + " | ".join([kind, *map(str, numbers)]) + " |")
    return "\n".join(lines)


def note(entry: dict) -> str:
    notes = []
    for result, step in ((entry, entry.get("step")), (entry.get("vllm", {}), "vLLM")):
        if "error" in result:
            notes.append(f"{step}: {result['error']['sentence']}".replace("|", "\\|"))
    return "; ".join(notes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="run these (again)")
    parser.add_argument("--list", action="store_true", help="name the families and stop")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "families")
    parser.add_argument("--limit", type=int, default=300, help="seconds for each process")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(families()):
        parser.error(f"no such family: {', '.join(sorted(unknown))}; see --list")
    report = json.loads(args.json.read_text()) if args.json.exists() else {}
    entries = report.setdefault("families", {})
    if args.list or args.table:
        print(f"{table(entries)}\n\n{counts(entries)}" if args.table else "\n".join(families()))
        return

    # this tree, and not the one that is installed
    sys.path.insert(0, str(ROOT))
    os.environ |= ENVIRONMENT | {"PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    PROCESSES.set_forkserver_preload(["family_compress"])
    server = Server()
    libraries = ("torch", "transformers", "llmcompressor", "compressed-tensors")
    report["versions"] = {name: version(name) for name in libraries}

    def save():
        report["families"] = {name: entries[name] for name in families() if name in entries}
        args.json.write_text(json.dumps(report, indent=1) + "\n")

    for name in args.only or families():
        folder = args.folder / name
        start = time.perf_counter()
        if args.only or name not in entries:
            entries[name] = run_compress(name, folder, args.limit)
            save()
        if "vllm" not in entries[name]:
            entries[name]["vllm"] = run_serve(server, name, entries[name], folder, args.limit)
            save()
            seconds = time.perf_counter() - start
            print(f"{name}: {seconds:.0f} s", whose_limit(entries[name]), file=sys.stderr)
    print(f"{table(entries)}\n\n{counts(entries)}")


if __name__ == "__main__":
    main()
