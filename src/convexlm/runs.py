"""The run folder: where everything of an experiment lies, and to which recipe it belongs.

    runs/NAME/
      recipe.yaml                                   the resolved recipe, with versions
      data/                                         what the recipe generated (tinyworld's corpus and tokenizer)
      train/RUN/checkpoint-STEP/, metrics.jsonl, done.json
      decode/RUN/checkpoint-STEP/TESTSET.PAIR.SEARCH.jsonl (and .meta.json)
      selection.json                                which checkpoint was chosen, where the recipe selects one
      scores.jsonl  comparison.json  report.html

RUN is the arm's name (`mle`, `convex-k1`), with `.seedN` behind it where a recipe trains every arm with several seeds.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from convexlm.errors import UserError
from convexlm.files import json_sha256, write_atomic
from convexlm.options import load_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from convexlm.recipe import Recipe

DONE_FILE = "done.json"  # of a training run
VERSIONED = ("convexlm", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "sacrebleu")
# What may change between two calls of one run without changing a result.
NOT_IDENTITY = ("description", "vars", "versions", "launch")


@dataclass(frozen=True)
class TrainedRun:
    """One arm trained with one seed."""

    arm: str
    seed: int
    name: str


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder; makes nothing by itself."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def data(self) -> Path:
        """What the recipe generated."""
        return self.path / "data"

    @property
    def references(self) -> Path:
        """One line a (test set, pair): its reference streams."""
        return self.data / "references.jsonl"

    @property
    def scores(self) -> Path:
        """One line a (arm, seed, checkpoint, test set, pair, search, metric)."""
        return self.path / "scores.jsonl"

    @property
    def selection(self) -> Path:
        """Which checkpoint of every run was chosen, and by which scores."""
        return self.path / "selection.json"

    @property
    def comparison(self) -> Path:
        """The significance tests."""
        return self.path / "comparison.json"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    def train(self, run: TrainedRun) -> Path:
        """Where a run's checkpoints and metrics lie."""
        return self.path / "train" / run.name

    def decode(self, run: TrainedRun, checkpoint: str, test_set: str, pair: str, search: str) -> Path:
        """The hypotheses of one checkpoint on one test set with one search."""
        return self.path / "decode" / run.name / checkpoint / f"{test_set}.{pair}.{search}.jsonl"

    def claim(self, recipe: Recipe) -> None:
        """Make this folder the recipe's, or check that it is.

        Raises:
            UserError: the folder belongs to another recipe, or holds something else.
        """
        if self.check(recipe):
            return
        text = yaml.safe_dump({**recipe.resolved, "versions": versions()}, sort_keys=False, allow_unicode=True)
        write_atomic(self.recipe, text)

    def check(self, recipe: Recipe) -> bool:
        """Whether this folder is the recipe's already; False where there is nothing yet. Writes nothing.

        Raises:
            UserError: the folder belongs to another recipe, or holds something else.
        """
        if self.recipe.exists():
            difference = _first_difference(_identity(load_yaml(self.recipe)), _identity(recipe.resolved))
            if difference:
                raise UserError(
                    f"{self.path} belongs to another recipe: {difference}; choose another --run_dir, or delete it"
                )
            return True
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file, not a folder")
        # A run that was killed at its very start leaves its lock, and perhaps a half-written recipe beside it.
        if self.path.is_dir() and any(
            entry.name != ".lock" and not entry.name.startswith(".recipe.yaml.") for entry in self.path.iterdir()
        ):
            raise UserError(
                f"{self.path} holds files but no recipe.yaml, so it is no run folder; choose another --run_dir"
            )
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            UserError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be used as a run folder ({error.strerror or error})") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another `convexlm run` is at work here") from None
            yield
        finally:
            os.close(handle)


def trained_runs(recipe: Recipe) -> list[TrainedRun]:
    """Every (arm, seed) of a recipe, an arm's start always before the arm."""
    several = len(recipe.seeds) > 1
    return [
        TrainedRun(arm.name, seed, f"{arm.name}.seed{seed}" if several else arm.name)
        for seed in recipe.seeds
        for arm in recipe.arms
    ]


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def identity_sha256(recipe: Recipe) -> str:
    """The hash of what makes a recipe this one and not another."""
    return json_sha256(_identity(recipe.resolved))


def _identity(resolved: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resolved.items() if key not in NOT_IDENTITY}


def _first_difference(theirs: Any, ours: Any, path: str = "") -> str | None:
    """Where two recipes part, in words; None where they do not."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            found = _first_difference(theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if theirs == ours else f"`{path}` is {_short(theirs)} there and {_short(ours)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
