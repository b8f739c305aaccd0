"""The decode files of a run folder, each with what it holds and what counts its scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convexlm.same_sentences import sentence_groups
from convexlm.scoring import Scorer
from convexlm.segments import read_hypotheses
from convexlm.significance import Corpus
from convexlm.sweep import candidate_checkpoints

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from convexlm.recipe import Recipe
    from convexlm.runs import RunFolder, TrainedRun
    from convexlm.testsets import TestSet


@dataclass(frozen=True)
class Decoded:
    """One decode file, and what it holds."""

    run: TrainedRun
    checkpoint: str
    test_set: TestSet
    search: str
    path: Path
    hypotheses: list[str]
    scorer: Scorer  # one for all decode files of a test set: every sentence is counted once
    group: str  # one for all test sets of the same sentences, which are resampled together
    role: str = "test"  # or "validation"

    @property
    def target_lang(self) -> str:
        """The language code that is translated into."""
        return self.test_set.pair.split("-")[1]


def read_decoded(
    recipe: Recipe,
    folder: RunFolder,
    runs: Sequence[TrainedRun],
    sets: Sequence[TestSet],
    chosen: dict[str, str],
    role: str = "test",
) -> list[Decoded]:
    """The decode files that there must be: under `selection: validation`, test sets have the chosen checkpoints'.

    Args:
        recipe: the recipe.
        folder: its run folder.
        runs: its trainings.
        sets: the test or validation sets.
        chosen: the compared checkpoint of every training, by its name.
        role: what the sets are for, "test" or "validation".

    Raises:
        UserError: a file is missing or damaged.
    """
    from convexlm.decoding import Search

    searches = [Search.from_mapping(options).name for options in recipe.decode["searches"]]
    if role == "validation":
        searches = [recipe.selection["search"]]
    only_chosen = role == "test" and recipe.selection["on"] == "validation"
    scorers = [Scorer(one.references, one.pair.split("-")[1], recipe.metrics) for one in sets]
    groups = sentence_groups(sets)
    found = []
    for run, checkpoint in candidate_checkpoints(recipe, folder, runs):
        if only_chosen and checkpoint.name != chosen[run.name]:
            continue
        for test_set, scorer, group in zip(sets, scorers, groups, strict=True):
            for search in searches:
                path = folder.decode(run, checkpoint.name, test_set.name, test_set.pair, search)
                lines = read_hypotheses(path)
                found.append(Decoded(run, checkpoint.name, test_set, search, path, lines, scorer, group, role))
    return found


def read_meta(entry: Decoded) -> dict[str, Any]:
    """The record beside a decode file."""
    meta: dict[str, Any] = json.loads(entry.path.with_suffix(".meta.json").read_text(encoding="utf-8"))
    return meta


def decoding_seconds(meta: Mapping[str, Any]) -> float | None:
    """What decoding a file took, summed over processes and over the runs that a stop parted it into, in seconds.

    Of a file of an earlier version that was gone on with the first part is not known: None.
    """
    if "process_seconds" in meta:
        seconds: float | None = meta["process_seconds"]
        return seconds
    return None if meta.get("resumed") else meta.get("seconds")


def make_corpus(systems: dict[str, Decoded]) -> Corpus:
    """Decode files of one test set and seed, by system, as a corpus for a test."""
    entry = next(iter(systems.values()))
    return Corpus(
        name=f"{entry.test_set.name} {entry.test_set.pair}, seed {entry.run.seed}",
        target_lang=entry.target_lang,
        systems={name: decoded.hypotheses for name, decoded in systems.items()},
        references=entry.test_set.references,
        group=entry.group,
        scorer=entry.scorer,
    )
