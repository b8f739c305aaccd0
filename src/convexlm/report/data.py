"""What a report knows of a run: read from the run folder's files, and from nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_jsonl, read_text
from convexlm.options import load_yaml
from convexlm.runs import RunFolder, TrainedRun

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1  # of comparison.json
NEEDED = ("recipe", "baseline", "arms", "seeds", "checkpoints", "searches", "metrics", "corpora", "table")
OF_A_SCORE = ("arm", "seed", "checkpoint", "test_set", "pair", "search", "metric", "score")
METRICS_FILE = "metrics.jsonl"
REFERENCES_FILE = "references.jsonl"


@dataclass(frozen=True)
class RunData:
    """A run folder's content, but for the sentences (`sentences` reads those).

    Attributes:
        path: the run folder.
        recipe: the resolved recipe, without `versions`.
        versions: versions of the packages at the start of the run.
        comparison: `comparison.json`.
        scores: the rows of `scores.jsonl`.
        runs: every arm and seed that was compared, arms in the comparison's order.
        metrics: a run's `metrics.jsonl` by the run's name; runs without one are left out.
    """

    path: Path
    recipe: dict[str, Any]
    versions: dict[str, str]
    comparison: dict[str, Any]
    scores: list[dict[str, Any]]
    runs: list[TrainedRun]
    metrics: dict[str, list[dict[str, Any]]]

    @property
    def folder(self) -> RunFolder:
        """The paths of the run folder."""
        return RunFolder(self.path)

    @property
    def arms(self) -> list[str]:
        """Names of the arms, the baseline first."""
        return list(self.comparison["arms"])

    @property
    def several_seeds(self) -> bool:
        """Whether every arm was trained more than once."""
        return len(self.comparison["seeds"]) > 1

    @cached_property
    def scored_hashes(self) -> dict[tuple[Any, ...], tuple[str, list[str]]]:
        """Hashes of what was scored, hypotheses and references, by arm, seed, checkpoint, set, pair and search."""
        keys = ("arm", "seed", "checkpoint", "test_set", "pair", "search")
        return {
            tuple(row.get(key) for key in keys): (row["hypotheses_sha256"], row["references_sha256"])
            for row in self.scores
            if row.get("hypotheses_sha256") and row.get("references_sha256") and not row.get("imported")
        }

    def style(self, arm: str) -> str:
        """The CSS class that gives an arm its colour: `arm0` is the baseline's."""
        return f"arm{self.arms.index(arm) % 8}"

    def checkpoint(self, run: TrainedRun) -> str | None:
        """The checkpoint at which a run was compared, such as `checkpoint-200`."""
        return self.comparison["checkpoints"].get(run.name)


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, a stage is not done yet (the message names it), or a file cannot be used.
    """
    folder = RunFolder(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; give a run folder, as `convexlm run` makes it")
    if not folder.recipe.is_file():
        raise UserError(f"{path} is no run folder: it has no recipe.yaml; give one that `convexlm run` made")
    if not folder.comparison.is_file() or not folder.scores.is_file():
        raise UserError(
            f"{path}: nothing to report yet, {_missing_stage(folder)}; "
            f"go on with `convexlm run RECIPE --run_dir {path}`"
        )
    recipe = load_yaml(folder.recipe)
    versions = recipe.pop("versions", None)
    recipe.pop("plain_seed", None)
    comparison = _read_comparison(folder)
    scores = _read_scores(folder, comparison)
    runs = _runs(comparison)
    metrics = {run.name: rows for run in runs if (rows := _read_metrics(folder, run))}
    return RunData(
        path=path,
        recipe=recipe,
        versions={str(key): str(value) for key, value in (versions or {}).items()},
        comparison=comparison,
        scores=scores,
        runs=runs,
        metrics=metrics,
    )


def read_references(run: RunData) -> dict[tuple[str, str], list[list[str]]]:
    """The reference streams that the run folder keeps, by (test set, pair); empty where it keeps none.

    Raises:
        UserError: the file is no JSON Lines file of references.
    """
    path = run.folder.data / REFERENCES_FILE
    if not path.is_file():
        return {}
    found = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        streams = row.get("references")
        if not isinstance(streams, list) or not all(isinstance(stream, list) for stream in streams):
            raise UserError(f"{path}, record {number}: `references` must be a list of lists of sentences")
        found[str(row.get("test_set")), str(row.get("pair"))] = [[str(text) for text in one] for one in streams]
    return found


def _missing_stage(folder: RunFolder) -> str:
    """Which stage of the corridor comes next, by what there is."""
    if not any(folder.path.glob("train/*/done.json")):
        return "no arm is trained (stage `train`)"
    if not any(folder.path.glob("decode/*/*/*.jsonl")):
        return "no test set is decoded (stage `decode`)"
    missing = "comparison.json" if folder.scores.is_file() else "scores.jsonl"
    return f"there is no {missing} (stage `score and compare`)"


def _read_comparison(folder: RunFolder) -> dict[str, Any]:
    try:
        comparison = json.loads(read_text(folder.comparison))
    except json.JSONDecodeError as error:
        raise UserError(f"{folder.comparison}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(comparison, dict) or comparison.get("schema") != SCHEMA:
        raise UserError(f"{folder.comparison}: written by another version of convexlm; run the recipe again")
    for key in NEEDED:
        if key not in comparison:
            raise UserError(f"{folder.comparison}: has no `{key}`; delete it and run the recipe again")
    if not comparison["arms"] or not comparison["metrics"] or not comparison["table"]:
        raise UserError(f"{folder.comparison}: compares nothing; delete it and run the recipe again")
    for row in comparison["table"]:
        if lacking := [key for key in ("search", "arm", "metric", "score") if key not in row]:
            raise UserError(f"{folder.comparison}: a row has no `{lacking[0]}`; delete it and run the recipe again")
    later = ("gaps", "paired", "outputs", "by_length", "by_reference_nll", "checkpoints_scores")
    absent: dict[str, Any] = {key: [] for key in later}
    absent |= {"resampling": {}, "selection": {"on": "last"}, "reference_nll": {"base": None, "reason": None}}
    return absent | comparison


def _read_scores(folder: RunFolder, comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `scores.jsonl`, which must be those that were compared: the page shows both."""
    from convexlm.evaluation import scores_sha256

    rows = list(read_jsonl(folder.scores, torn_last_line_ok=True))
    for number, row in enumerate(rows, start=1):
        if lacking := [key for key in OF_A_SCORE if key not in row]:
            raise UserError(f"{folder.scores}, record {number}: has no `{lacking[0]}`; run the recipe again")
    # Earlier versions kept no hash.
    if comparison.get("scores_sha256") not in (None, scores_sha256(rows)):
        raise UserError(
            f"{folder.scores}: not the scores that {folder.comparison.name} compares (a run was stopped between the "
            "two, or one was changed); run the recipe again"
        )
    return rows


def _runs(comparison: dict[str, Any]) -> list[TrainedRun]:
    known = comparison["checkpoints"]  # by the run's name, which of a run's first seed may be the arm's
    names = {(arm, seed): f"{arm}.seed{seed}" for arm in comparison["arms"] for seed in comparison["seeds"]}
    return [TrainedRun(arm, seed, name if name in known else arm) for (arm, seed), name in names.items()]


def _read_metrics(folder: RunFolder, run: TrainedRun) -> list[dict[str, Any]]:
    path = folder.train(run) / METRICS_FILE
    return list(read_jsonl(path, torn_last_line_ok=True)) if path.is_file() else []
