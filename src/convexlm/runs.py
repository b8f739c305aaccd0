"""The run folder: where everything of an experiment lies, and to which recipe it belongs.

    runs/NAME/
      recipe.yaml                                   the resolved recipe, with versions
      data/                                         what the recipe generated (tinyworld's corpus and tokenizer)
      train/RUN/checkpoint-STEP/, metrics.jsonl, identity.json, done.json
      decode/RUN/checkpoint-STEP/TESTSET.PAIR.SEARCH.jsonl (and .meta.json)
      selection.json                                which checkpoint was chosen, where the recipe selects one
      scores.jsonl  comparison.json  report.html

RUN is the arm's name (`mle`, `convex-k1`), with `.seedN` behind it where a recipe trains every arm with several seeds.
A recipe may get more seeds and arms later and go on in its folder. If it began with one seed, that one's runs keep
their plain names; `plain_seed` in recipe.yaml says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import importlib.metadata
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.checkpoints import all_checkpoints
from convexlm.errors import UserError
from convexlm.files import json_sha256, read_json_object, write_atomic
from convexlm.options import dump_yaml, load_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convexlm.recipe import Recipe

DONE_FILE = "done.json"  # of a training run
VERSIONED = ("convexlm", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "sacrebleu")
# What may change between two calls of one run. Of `launch` the global batch matters to a result, which is
# in every training's identity (see `training_identity`).
NOT_IDENTITY = ("description", "vars", "versions", "launch", "plain_seed")


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

    def __post_init__(self) -> None:
        # Below "." a path does not show that it is in the run folder, so the folder could not be moved.
        if self.path == Path():
            object.__setattr__(self, "path", Path.cwd())

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
        """Make this folder the recipe's, or check that it is; a recipe that has grown is written anew.

        Raises:
            UserError: the folder belongs to another recipe, or holds something else.
        """
        if self.check(recipe):
            return
        kept: dict[str, Any] = {"versions": versions()}
        if self.recipe.exists():
            before = load_yaml(self.recipe)
            kept["versions"] = before.get("versions") or kept["versions"]
            if (plain := _plain_seed(before)) is not None:
                kept["plain_seed"] = plain
        write_atomic(self.recipe, dump_yaml({**recipe.resolved, **kept}))

    def continued(self, recipe: Recipe) -> Recipe:
        """The recipe with the names that this folder's runs have had from its beginning."""
        if not self.recipe.exists():
            return recipe
        return replace(recipe, plain_seed=_plain_seed(load_yaml(self.recipe)))

    def check(self, recipe: Recipe) -> bool:
        """Whether this folder is the recipe's already; False where there is nothing yet, or less. Writes nothing.

        A recipe with more seeds or more arms than the folder's, and the same in all else, may go on there. Arms of
        which nothing is trained yet, and the decoding where nothing is decoded, may be other ones.

        Raises:
            UserError: the folder belongs to another recipe, or holds something else.
        """
        if self.recipe.exists():
            theirs, ours = _identity(load_yaml(self.recipe)), _identity(recipe.resolved)
            difference = _first_difference(_grown(self._settled(theirs, ours), ours), ours)
            if difference:
                raise UserError(
                    f"{self.path} belongs to another recipe: {difference}; choose another --run_dir, or delete it"
                )
            return theirs == ours
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

    def _settled(self, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """The folder's recipe with ours in place of what nothing was made with yet."""
        settled = dict(theirs)
        if isinstance(theirs.get("arms"), dict):
            settled["arms"] = {name: arm for name, arm in theirs["arms"].items() if self._is_begun(name)}
        if not any((self.path / "decode").glob("*/*/*")):
            settled["decode"] = ours.get("decode")
        return settled

    def _is_begun(self, arm: str) -> bool:
        """Whether there is a checkpoint of an arm, with any seed."""
        train = self.path / "train"
        places = [train / arm, *train.glob(f"{glob.escape(arm)}.seed*")]
        return any((place / DONE_FILE).exists() or all_checkpoints(place) for place in places)

    def _remove_leftovers(self) -> None:
        """Remove what `write_atomic` had begun to write when an earlier call was killed."""
        for pattern in ("data/.*.tmp", "train/*/.*.tmp", ".selection.json.*.tmp", ".comparison.json.*.tmp"):
            for path in self.path.glob(pattern):
                if path.is_file():
                    path.unlink()

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
                # Of this process alone: a forked worker that outlives a kill by some seconds does not keep it.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another `convexlm run` is at work here") from None
            self._remove_leftovers()
            yield
        finally:
            os.close(handle)


def trained_runs(recipe: Recipe) -> list[TrainedRun]:
    """Every (arm, seed) of a recipe, an arm's start always before the arm."""
    return [
        TrainedRun(arm.name, seed, run_name(recipe, arm.name, seed)) for seed in recipe.seeds for arm in recipe.arms
    ]


def run_name(recipe: Recipe, arm: str, seed: int) -> str:
    """What the folders of an arm and seed are called."""
    return arm if len(recipe.seeds) == 1 or seed == recipe.plain_seed else f"{arm}.seed{seed}"


def read_done(place: Path) -> dict[str, Any]:
    """What `done.json` says of a training that was finished: `checkpoints`, names by step, and more.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        done = read_json_object(place / DONE_FILE)
        names = done.get("checkpoints")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{place / DONE_FILE}: does not say which `checkpoints` there are")
    except UserError as error:
        raise UserError(f"{error}; delete it, and the training is taken up at its last checkpoint") from None
    return done


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
    found = {key: value for key, value in resolved.items() if key not in NOT_IDENTITY}
    if isinstance(seed := found.get("seeds"), int):  # as recipes of one seed were kept before
        found["seeds"] = [seed]
    if isinstance(decode := found.get("decode"), dict):  # any number of processes writes the same files
        of_the_machine = ("num_processes", "gpu_memory_utilization")
        found["decode"] = {key: value for key, value in decode.items() if key not in of_the_machine}
    return found


def _plain_seed(resolved: dict[str, Any]) -> int | None:
    """The seed whose runs are called by their arms alone, of a recipe in a run folder."""
    seeds = _identity(resolved).get("seeds") or []
    return resolved.get("plain_seed", seeds[0] if len(seeds) == 1 else None)


def _grown(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """A folder's recipe with the arms and seeds added that ours has beyond them."""
    arms, seeds = theirs.get("arms"), theirs.get("seeds")
    theirs = dict(theirs)
    if isinstance(arms, dict):
        theirs["arms"] = {**{name: arm for name, arm in ours["arms"].items() if name not in arms}, **arms}
    if isinstance(seeds, list) and set(seeds) <= set(ours["seeds"]):
        theirs["seeds"] = ours["seeds"]
    return theirs


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
