"""A whole experiment small enough for tests, and ways to start `convexlm` on it."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

TINY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [1, 2],
    "model": {
        "tokenizer": "tinyworld",
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
    },
    "data": {"dataset": {"kind": "tinyworld", "directions": ["en-de", "en-zh"], "size": 200, "seed": 3}},
    "train": {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "gradient_checkpointing": False,
    },
    "arms": {
        "base": {"objective": "mle", "max_steps": 60, "save_steps": 60, "decode": False},
        "mle": {"objective": "mle", "init_from": "base"},
        "convex": {"objective": "convex", "k": 1.0, "init_from": "base"},
    },
    "test_sets": [{"name": "toy", "kind": "tinyworld", "pairs": ["en-de", "en-zh"], "size": 3, "seed": 5}],
    "decode": {
        "checkpoints": "all",
        "batch_size": 2,
        "searches": [{"num_beams": 1, "max_new_tokens": 12}, {"num_beams": 2, "max_new_tokens": 12}],
    },
    "compare": {"n_samples": 50},
}
# Read when huggingface_hub is imported, so a fixture would come too late.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def recipe_with(**changes: Any) -> dict[str, Any]:
    """The tiny recipe with top-level entries replaced; None leaves one out. `train__k` reaches into `train`."""
    recipe = copy.deepcopy(TINY)
    for key, value in changes.items():
        place, (*path, last) = recipe, key.split("__")
        for part in path:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return recipe


def write_recipe(folder: Path, recipe: dict[str, Any] | None = None, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe or TINY, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def start(words: list[Any], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """`convexlm WORDS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "convexlm.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # Whoever runs the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def call(words: list[Any], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`convexlm WORDS`, waited for."""
    process = start(words, cwd, **environment)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_when(process: subprocess.Popen[str], condition: Any, timeout: float = 120) -> None:
    """Kill a process with SIGKILL at the moment a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended before the moment to kill it: {process.communicate()[1]}")
        if time.monotonic() > end:
            process.kill()
            raise AssertionError("the moment to kill it never came")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Modification time and size of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def results(folder: Path) -> tuple[str, str]:
    """What a run is for: `scores.jsonl` and `comparison.json`, both without wall-clock seconds."""
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    for row in rows:
        if "decoding" in row:
            del row["decoding"]["seconds"]
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    for row in comparison["outputs"]:
        del row["seconds_per_sentence"]
    return "\n".join(map(json.dumps, rows)), json.dumps(comparison)
