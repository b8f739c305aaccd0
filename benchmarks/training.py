"""Time and memory of training heads and of whole training steps, side by side in one run.

    OMP_NUM_THREADS=2 python benchmarks/training.py --data DATA --output results/training

Every candidate has a process of its own; they take turns, one repeat each, so that what else the machine does hits
all alike. Times are medians over repeats after one that is not counted; memory is the process's peak resident set as
the operating system counts it (on a GPU: allocated memory as CUDA counts it), less what it held before the first
repeat. Processor time stands beside the clock's: with OMP_NUM_THREADS=1 it is what a busy machine cannot spoil.
Writes OUTPUT.json (a table that is there already is replaced) and prints the tables. Candidates that need CUDA are
listed as not measured elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HEADS = {  # name -> tokens, hidden size, vocabulary
    "1024 x 32000": (2048, 1024, 32_000),
    "LLaMA-7B, 4096 x 32000": (512, 4096, 32_000),
    "1024 x 151936": (512, 1024, 151_936),
    "4096 x 151936": (512, 4096, 151_936),
}
GPU_HEADS = {"LLaMA-7B, 4096 x 32000": (16_384, 4096, 32_000), "4096 x 151936": (8192, 4096, 151_936)}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", nargs="+", choices=["head", "step"], default=["head", "step"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the heads")
    parser.add_argument("--shapes", nargs="+", help="names of the heads' shapes; all by default")
    parser.add_argument("--candidates", nargs="+", help="names; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=7, help="optimizer steps; the first is not counted")
    parser.add_argument("--model", default="58m", help="58m, 110m or 7b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=3, help="packed rows of 512 tokens a step")
    parser.add_argument("--lora", action="store_true", help="whole steps of LoRA, all linear layers, instead of full")
    parser.add_argument("--layouts", nargs="+", choices=["padded", "packed"], default=["padded", "packed"])
    parser.add_argument("--optim", default="adamw_torch_fused", help="optimizer of whole steps; transformers' default")
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="end a candidate's process before the next starts: for big models"
    )
    parser.add_argument("--float32", action="store_true", help="whole steps in float32 instead of bf16 autocast")
    parser.add_argument(
        "--data", default=os.environ.get("CONVEXLM_SHARED_DATA"), help="folder with alpaca, tokenizers"
    )
    parser.add_argument("--output", default="results/training", help="path without suffix")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work(json.loads(args.worker))
        return
    if "step" in args.level and not args.data:
        parser.error("--data is needed for whole steps: a folder with alpaca/ and tokenizers/")
    about, file = _about(), Path(f"{args.output}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    for table in _tables(args, about["device"]):
        if args.candidates:
            table["names"] = [name for name in table["names"] if name in args.candidates]
            table["base"] = table["base"] if table["base"] in table["names"] else table["names"][0]
        before = os.getloadavg()[0]
        rows = _measure(table)
        _show(table, rows)
        load = [round(before, 1), round(os.getloadavg()[0], 1)]
        settings = {key: value for key, value in table["settings"].items() if key != "data"}
        entry = {"title": table["title"], "settings": settings, "about": {**about, "load_average": load}}
        # Tables of earlier runs stay, but for one that was measured again.
        kept = json.loads(file.read_text(encoding="utf-8"))["tables"] if file.exists() else []
        kept = [old for old in kept if _identity(old) != _identity(entry)]
        found = {"tables": [*kept, {**entry, "candidates": rows}]}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _identity(entry: dict[str, Any]) -> tuple[str, ...]:
    """What a table is of, and which machine it is from."""
    about = entry["about"]
    return entry["title"], about["device"], about["gpu"], about["cpu"], str(about["cpu_flags"])


def _tables(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    from training_head import NAMES
    from training_steps import LAYOUTS

    tables = []
    for dtype in args.dtypes if "head" in args.level else ():
        shapes = GPU_HEADS if device == "cuda" else HEADS
        for name in args.shapes or (shapes if dtype == "bfloat16" else list(shapes)[:1]):
            tokens, hidden_size, vocabulary = shapes[name]
            settings = {"tokens": tokens, "hidden_size": hidden_size, "vocabulary": vocabulary, "dtype": dtype}
            title = f"head, {tokens} tokens x {name}, {dtype}"
            tables.append(_table("head", title, {**settings, "device": device}, NAMES, args.repeats, "products"))
            tables[-1]["one_at_a_time"] = args.one_at_a_time
    for layout, names in LAYOUTS.items() if "step" in args.level else ():
        if layout not in args.layouts:
            continue
        settings = {"layout": layout, "model": args.model, "batch": args.batch, "rows": args.rows}
        settings |= {"steps": args.steps, "bf16": not args.float32, "device": device, "data": str(args.data)}
        settings |= {"lora": args.lora, "optim": args.optim}
        size = f"batches of {args.batch}" if layout == "padded" else f"{args.rows} packed rows"
        size += ", LoRA" if args.lora else ""
        title = f"whole step, {args.model} model, {size}, {_precision(args, device)}"
        tables.append(_table("step", title, settings, names, args.steps - 1, "convexlm-mle"))
        # Several copies of 7 billion parameters would not fit the device.
        tables[-1]["one_at_a_time"] = args.one_at_a_time or args.model == "7b"
    return tables


def _precision(args: argparse.Namespace, device: str) -> str:
    if args.float32:
        return "float32"
    return "bf16 weights" if args.model == "7b" and device == "cuda" else "bf16 autocast"


def _table(level: str, title: str, settings: Any, names: list[str], repeats: int, base: str) -> dict[str, Any]:
    return {"level": level, "title": title, "settings": settings, "names": names, "repeats": repeats, "base": base}


# -- the process that asks ------------------------------------------------------------------------------------------


class Worker:
    """A candidate's process; answers a line for a line."""

    def __init__(self, level: str, name: str, settings: dict[str, Any]) -> None:
        """Start it; it makes its inputs while the others start."""
        job = json.dumps({"level": level, **settings, "candidate": name})
        command = [sys.executable, __file__, "--worker", job]
        # A file and not a pipe: nobody reads along, and a worker that had filled the pipe would wait for ever.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed in `end`
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ready: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it is ready, or has failed."""
        self.ready = self._read()

    def repeat(self) -> dict[str, Any]:
        """One repeat's numbers; {"error": ...} if it could not be run."""
        if "error" in self.ready:
            return self.ready
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        numbers = self._read()
        if "error" in numbers:
            self.ready = numbers
        return numbers

    def end(self) -> None:
        """Let it go."""
        self.process.communicate()
        self.errors.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            return {"error": self.errors.read().strip().split("\n")[-1] or "ended without a word"}
        return dict(json.loads(line))


def _measure(table: dict[str, Any]) -> list[dict[str, Any]]:
    names = table["names"]
    repeats: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for group in [[name] for name in names] if table["one_at_a_time"] else [names]:
        workers = {name: Worker(table["level"], name, table["settings"]) for name in group}
        for worker in workers.values():
            worker.wait()  # nobody is timed while another still starts
        for turn in range(table["repeats"] + 1):
            for name, worker in workers.items():
                numbers = worker.repeat()
                if turn or "error" in numbers:
                    repeats[name].append(numbers)
        for worker in workers.values():
            worker.end()
    rows = []
    for name, numbers in repeats.items():
        errors = [n["error"] for n in numbers if "error" in n]
        if errors:
            rows.append({"name": name, "not_measured": errors[0]})
            continue
        seconds = [n["seconds"] for n in numbers]
        row = {"name": name, "seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
        row["processor_seconds"] = statistics.median(n["processor_seconds"] for n in numbers)
        row["peak_bytes"], row["peak_bytes_total"] = numbers[-1]["peak_bytes"], numbers[-1]["peak_bytes_total"]
        row["tokens_per_second"] = sum(n["tokens"] for n in numbers) / sum(seconds)
        row["tokens"] = [n["tokens"] for n in numbers]
        if "matrix_share" in numbers[-1]:
            row["matrix_share"] = statistics.median(n["matrix_share"] for n in numbers)
        row["all_processor_seconds"] = [n["processor_seconds"] for n in numbers]
        rows.append(row | {"all_seconds": seconds})
    base = next((r for r in rows if r["name"] == table["base"] and "seconds" in r), None)
    for row in rows:
        if base and "seconds" in row:
            # The ratio of each turn, then the median: neighbours in time share what else the machine did.
            for prefix in ("", "processor_"):
                pairs = zip(row[f"all_{prefix}seconds"], base[f"all_{prefix}seconds"], strict=True)
                row[f"{prefix}ratio_to_{table['base']}"] = statistics.median(a / b for a, b in pairs)
    return rows


def _show(table: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    base = table["base"]
    print(f"\n{table['title']}\n")
    print(f"| candidate | seconds | fastest | x {base} | processor s | x {base} | peak MB above start | tokens/s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        if "not_measured" in row:
            print(f"| {row['name']} | not measured: {row['not_measured']} | | | | | | |")
            continue
        print(
            f"| {row['name']} | {row['seconds']:.3f} | {row['fastest']:.3f} | {row.get(f'ratio_to_{base}', 0):.2f} "
            f"| {row['processor_seconds']:.3f} | {row.get(f'processor_ratio_to_{base}', 0):.2f} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['tokens_per_second']:.0f} |"
        )
        if "matrix_share" in row:
            print(f"| {row['name']}: {row['matrix_share']:.2f} of the measured bf16 matrix rate | | | | | | | |")
    sys.stdout.flush()


def _about() -> dict[str, Any]:
    import torch

    packages = {}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "convexlm",
        "liger_kernel",
        "cut_cross_entropy",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    cpu, flags = platform.processor(), []
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = dict(line.split("\t: ", 1) for line in information.read_text().split("\n") if "\t: " in line)
        cpu = lines.get("model name", cpu)
        flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in lines.get("flags", "")]
    on_gpu = torch.cuda.is_available()
    return {
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "device": "cuda" if on_gpu else "cpu",
        "gpu": torch.cuda.get_device_name() if on_gpu else "not measured: none at hand",
        "cpu": cpu,
        "cpu_flags": flags,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "malloc_settings": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
    }


# -- the process that is asked ---------------------------------------------------------------------------------------


def _work(settings: dict[str, Any]) -> None:
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    on_gpu = settings["device"] == "cuda"

    def resident(field: str) -> int:
        if on_gpu:
            return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        lines = Path("/proc/self/status").read_text().split("\n")
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    def forget_peak() -> int:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return max(1, resident("VmRSS"))

    def answer(numbers: dict[str, Any]) -> None:
        print(json.dumps(numbers), file=answers, flush=True)

    begin = {"memory": 0, "processor": 0.0}

    def wait() -> bool:
        if not begin["memory"]:
            begin["memory"] = forget_peak()
            answer({"ready": True})
        asked = sys.stdin.readline().strip() == "go"
        begin["processor"] = time.process_time()
        return asked

    def report(numbers: dict[str, Any]) -> None:
        used = time.process_time() - begin["processor"]
        peak = resident("VmHWM")
        answer({**numbers, "processor_seconds": used, "peak_bytes": peak - begin["memory"], "peak_bytes_total": peak})

    if settings["level"] == "step":
        from training_steps import run

        run(settings, wait, report)
        return
    from training_head import HeadCandidate

    sizes = [settings[name] for name in ("tokens", "hidden_size", "vocabulary", "dtype", "device")]
    head = HeadCandidate(settings["candidate"], *sizes)
    while wait():
        start = time.perf_counter()
        tokens = head.run()
        if on_gpu:
            torch.cuda.synchronize()
        report({"seconds": time.perf_counter() - start, "tokens": tokens})


if __name__ == "__main__":
    main()
