"""Is the memory that a dry run promises the memory that training takes? On a CPU, resident set of a process.

    python benchmarks/memory.py                      # all cases; writes results/memory.json and results/memory.md
    python benchmarks/memory.py --cases plain lora   # those whose names contain one of these words
    python benchmarks/memory.py --render             # results/memory.md anew from results/memory.json

Each case is a process of its own that trains three optimizer steps with `ConvexTrainer`. Its resident set is read
before it has a model (`base`), and the peak since training began is read at the end (VmHWM, reset by clear_refs). What
is compared is the growth, peak - base, with `estimate_memory(...).peak`; and the peak itself with `.total`, which adds
what the framework takes (one constant for all).

A process's resident set also holds what the allocator keeps of freed memory. Each case therefore runs in several
ways, turn by turn: `glibc` is glibc as it comes, with its moving threshold; `returning` is `--return_freed_memory
true` on a CPU (`convexlm.allocator`: freed tensors go back to the system); `jemalloc` is jemalloc preloaded, where it
is installed. Processor time is that of `train()`, for the steps alone.

Cases with `processes` train together over gloo, sharded as `convexlm train --accelerate_config` shards (DeepSpeed
where it is installed); the figures are those of the process that took most.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memory_cases import CASES, SHAPES, config_of, estimate_of, peft_of
from memory_table import table

# No variable MALLOC_* may be set for `glibc`: most of them stop its threshold from moving, whatever their value.
ALLOCATORS = ("returning", "glibc", "jemalloc")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "deepspeed")
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run what was asked for; write the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", help="words; a case runs if its name holds one of them")
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, help="by default all that are at hand")
    parser.add_argument("--repeats", type=int, default=2, help="turns over all cases")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="only write the table anew from the JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    jemalloc = ctypes.util.find_library("jemalloc")
    if jemalloc is None and "jemalloc" in (args.allocators or ()):
        parser.error("--allocators jemalloc: there is no such library here (Debian: apt install libjemalloc2)")
    allocators = args.allocators or [name for name in ALLOCATORS if name != "jemalloc" or jemalloc]
    if args.child:
        answer = json.dumps(measure(json.loads(args.child)))
        (args.answers / f"{os.environ.get('RANK', '0')}.json").write_text(answer, encoding="utf-8")
        return
    target = args.output_dir / "memory.json"
    if args.render:
        result = json.loads(target.read_text(encoding="utf-8"))
    else:
        chosen = {n: c for n, c in CASES.items() if not args.cases or any(word in n for word in args.cases)}
        result = {"about": about(), "rows": rows_of(chosen, args.repeats, allocators)}
        if args.cases and target.exists():  # these rows anew, the others as they are
            before = json.loads(target.read_text(encoding="utf-8"))
            fresh = {row["case"]: row for row in result["rows"]}
            there = {row["case"] for row in before["rows"]}
            # The estimate shown is that of `returning`'s run.
            kept = {name: {k: v for k, v in row.items() if k != "estimate"} for name, row in fresh.items()}
            rows = [
                {**row, **(fresh if "returning" in fresh.get(row["case"], ()) else kept).get(row["case"], {})}
                for row in before["rows"]
            ]
            result["rows"] = [*rows, *(row for name, row in fresh.items() if name not in there)]
            known = before["about"]
            result["about"]["command"] = f"{known['command']}; {result['about']['command']}"
            result["about"]["packages"] = known["packages"] | result["about"]["packages"]
            if "gpu" in before:
                result["gpu"] = before["gpu"]
            if "earlier" in before["about"]:
                result["about"]["earlier"] = before["about"]["earlier"]
        args.output_dir.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result)
    (args.output_dir / "memory.md").write_text(text, encoding="utf-8")
    print(text)


def rows_of(cases: dict[str, dict[str, Any]], repeats: int, allocators: list[str]) -> list[dict[str, Any]]:
    """Estimate and measure every case, allocators and repeats taking turns."""
    seen: dict[str, dict[str, list[dict[str, Any]]]] = {name: {a: [] for a in allocators} for name in cases}
    for turn in range(repeats):
        for name, case in cases.items():
            for allocator in allocators:
                seen[name][allocator].append(child(case, allocator))
                print(f"{turn + 1}/{repeats} {name}, {allocator}", file=sys.stderr)
    rows = []
    for name, case in cases.items():
        row: dict[str, Any] = {"case": name, "settings": case}
        for allocator, runs in seen[name].items():
            estimate = row["estimate"] = runs[-1].pop("estimate")
            for run in runs:
                run.pop("estimate", None)
            growth = statistics.median(run["peak"] - run["base"] for run in runs)
            peak = statistics.median(run["peak"] for run in runs)
            row[allocator] = {
                "runs": runs,
                "growth": growth,
                "peak": peak,
                "growth_error": estimate["peak"] / growth - 1,
                "peak_error": estimate["total"] / peak - 1,
                "seconds": statistics.median(run["seconds"] for run in runs),
            }
        rows.append(row)
    return rows


def child(case: dict[str, Any], allocator: str) -> dict[str, Any]:
    """One run in processes of its own: `base` and `peak` in bytes, of the one that took most, and the estimate."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    if allocator == "jemalloc":
        environment["LD_PRELOAD"] = str(ctypes.util.find_library("jemalloc"))
    command = [sys.executable]
    if processes := case.get("processes"):
        environment |= launch_variables(case)
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
        command += ["--rdzv_endpoint=localhost:0"]
    with tempfile.TemporaryDirectory() as folder:
        command += [__file__, "--answers", folder, "--child", json.dumps({**case, "allocator": allocator})]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            said = done.stderr.strip()
            raised = [line for line in said.split("\n") if "Error: " in line]
            raise SystemExit(f"{case}: {raised[0] if raised else said[-2000:]}")
        answers = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).iterdir()]
    if len(answers) != (processes or 1):
        raise SystemExit(f"{case}: {len(answers)} of {processes} processes have answered")
    return dict(max(answers, key=lambda answer: answer["peak"] - answer["base"]))


def launch_variables(case: dict[str, Any]) -> dict[str, str]:
    """What `convexlm train --accelerate_config` starts its processes with."""
    from convexlm.launch.environment import make_plan
    from convexlm.launch.settings import LaunchSettings

    kind = None if case["sharding"] == "ddp" else case["sharding"]
    settings = LaunchSettings(accelerate_config=kind, num_processes=case["processes"])
    return make_plan(settings.resolved(), use_cpu=True).variables


# -- the process that is measured


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Train a little, read the resident set before and at its most, and make the estimate."""
    import gc

    from convexlm.allocator import return_freed_memory
    from convexlm.head import workspace

    if case.pop("allocator") == "returning" and not return_freed_memory():
        raise SystemExit("this process's allocator cannot be set: `returning` needs glibc")
    tiny = {**case, "batch": 2, "length": 32, "model": "tiny"}
    SHAPES["tiny"] = {**SHAPES[case["model"]], "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    SHAPES["tiny"]["vocab_size"] = 64
    train(tiny)  # what libraries load lazily is part of the base
    workspace.clear()
    gc.collect()
    give_back()
    base = resident("VmRSS")
    seconds = train(case)
    peak = resident("VmHWM")
    if (
        case.get("sharding") == "zero3"
    ):  # or every model that is made from now on, the estimate's too, would be sharded
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    # In this process, for it has decided by its own timing whether the head's products are in half precision.
    return {"base": base, "peak": peak, "seconds": seconds, "estimate": estimate_of(case).as_dict()}


def give_back() -> None:
    """Let the allocator return what it holds free, as far as it can."""
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "mallctl"):
        loaded.mallctl(b"arena.4096.purge", None, None, None, 0)  # 4096: MALLCTL_ARENAS_ALL
    else:
        loaded.malloc_trim(0)


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def train(case: dict[str, Any]) -> float:
    """Three optimizer steps, and their processor time in seconds; the peak is reset when the loop begins."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from convexlm import ConvexConfig, ConvexTrainer
    from convexlm.launch.deepspeed import is_on_cpu, options_on_cpu, unsharded
    from convexlm.launch.engine import set_up

    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    accumulation, length = case.get("accumulation", 1), case["length"]
    lengths = [length - 16 * (i % 2) for i in range(3 * case["batch"] * accumulation * case.get("processes", 1))]
    if case["batch"] == 1:
        lengths = [length] * len(lengths)
    rows = [{"input_ids": [3] * n, "labels": [-100] * 4 + [5] * (n - 4)} for n in lengths]
    place = options_on_cpu({}) if is_on_cpu() else {"use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        args = ConvexConfig(
            folder,
            objective="convex",
            bf16=case.get("mixed_precision") == "bf16",
            per_device_train_batch_size=case["batch"],
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=case["gradient_checkpointing"],
            optim=case.get("optimizer", "adamw_torch_fused"),
            max_steps=3,
            max_length=length,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **place,
        )
        set_up(args)
        torch.manual_seed(0)
        how = {
            "attn_implementation": case.get("attention", "sdpa"),
            "dtype": getattr(torch, case.get("dtype", "float32")),
        }
        with unsharded(args):
            model = AutoModelForCausalLM.from_config(config_of(case["model"]), **how)
        if case.get("quantized"):
            model = quantized(model, case, how)
        dataset = Dataset.from_list(rows)
        trainer = ConvexTrainer(
            model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_of(case)
        )
        del model
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = resource.getrusage(resource.RUSAGE_SELF)
        trainer.train()
        after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def quantized(model: Any, case: dict[str, Any], how: dict[str, Any]) -> Any:
    """The model in bitsandbytes' 4 or 8 bits, by way of a folder."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=case["quantized"] == "4bit",
        load_in_8bit=case["quantized"] == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=how["dtype"],
        bnb_4bit_use_double_quant=case.get("double_quantized", False),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, **how)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # What was not quantized lies in the file, which would stay in memory as a whole (as pages that the system
            # takes back at need).
            parameter.data = parameter.data.clone()
    return model


# -- what is written


def about() -> dict[str, Any]:
    """Command, versions and machine."""
    import torch

    cpu = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = dict(line.split("\t: ", 1) for line in information.read_text().split("\n") if "\t: " in line)
        cpu = lines.get("model name", cpu)
    return {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "device": "cpu",
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "packages": {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)},
    }


if __name__ == "__main__":
    main()
