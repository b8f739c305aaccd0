"""A run folder in which everything up to decoding is done, with hypotheses of the test's own."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

import sacrebleu

from convexlm.evaluation import evaluate
from convexlm.recipe import load_recipe
from convexlm.runs import RunFolder, TrainedRun, trained_runs
from convexlm.sweep import decoded_checkpoints
from convexlm.testsets import TestSet
from pipeline_helpers import recipe_with, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["der", "kleine", "Hund", "sieht", "das", "rote", "Haus", "meine", "alte", "Katze", "am", "grünen", "Baum"]
CHINESE = "一只小狗看见了红色的房子和我的老猫"
SIZE = 24


def sentences(seed: int, pair: str) -> list[str]:
    chance = Random(seed)
    if pair.endswith("zh"):
        return ["".join(chance.choices(CHINESE, k=chance.randint(5, 12))) for _ in range(SIZE)]
    return [" ".join(chance.choices(WORDS, k=chance.randint(5, 12))) for _ in range(SIZE)]


def spoil(lines: list[str], share: float, seed: int) -> list[str]:
    """The lines with a share of them shortened by half."""
    chance = Random(seed)
    return [line[: len(line) // 2] if chance.random() < share else line for line in lines]


class Run:
    """A run folder in which everything up to decoding is done. Quality: `share` of spoiled lines."""

    def __init__(self, home: Path, pairs: tuple[str, ...] = ("en-de",), **changes: Any) -> None:
        home.mkdir(parents=True, exist_ok=True)
        changes.setdefault("test_sets", [{"name": "t", "pairs": list(pairs), "sources": "unused"}])
        changes.setdefault("arms", {"good": {"objective": "convex", "k": 1.0}, "mle": {"objective": "mle"}})
        self.recipe = load_recipe(write_recipe(home, recipe_with(**changes)))
        self.folder = RunFolder(home / "run")
        self.runs = trained_runs(self.recipe)
        self.test_sets = [
            TestSet("t", pair, ["source"] * SIZE, [sentences(0, pair)], [str(n) for n in range(SIZE)])
            for pair in pairs
        ]
        for run in self.runs:
            self.folder.train(run).mkdir(parents=True)
            done = {"identity": "x", "checkpoints": ["checkpoint-3", "checkpoint-12"]}
            (self.folder.train(run) / "done.json").write_text(json.dumps(done))

    def write(self, shares: dict[tuple[str, str], float] | None = None) -> None:
        """Hypotheses for everything; shares by (arm, search), at the last checkpoint."""
        from convexlm.decoding import Search

        for run in self.runs:
            if not self.recipe.arm(run.arm).decode:
                continue
            for checkpoint in decoded_checkpoints(self.recipe, self.folder, run):
                for test_set in self.test_sets:
                    for options in self.recipe.decode["searches"]:
                        search = Search.from_mapping(options).name
                        share = (
                            0.9 if checkpoint.name == "checkpoint-3" else (shares or {}).get((run.arm, search), 0.5)
                        )
                        # Common random numbers: a smaller share spoils a part of what a larger one does.
                        lines = spoil(test_set.references[0], share, run.seed)
                        path = self.folder.decode(run, checkpoint.name, "t", test_set.pair, search)
                        self.write_file(path, lines)

    def write_file(self, path: Path, lines: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": str(number), "source": "source", "hypothesis": line} for number, line in enumerate(lines)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        meta = {"cut": 1, "seconds": 2.0, "checkpoint_sha256": "c", "sources_sha256": "s"}
        path.with_suffix(".meta.json").write_text(json.dumps(meta))

    def hypotheses(self, run: TrainedRun, checkpoint: str, pair: str, search: str) -> list[str]:
        text = self.folder.decode(run, checkpoint, "t", pair, search).read_text(encoding="utf-8")
        return [json.loads(line)["hypothesis"] for line in text.split("\n")[:-1]]

    def evaluate(self) -> dict[str, Any]:
        return evaluate(self.recipe, self.folder, self.runs, self.test_sets)


def bleu(lines: list[str], references: list[str], pair: str) -> float:
    tokenize = "zh" if pair.endswith("zh") else "13a"
    return sacrebleu.corpus_bleu(lines, [references], tokenize=tokenize).score


def chrf(lines: list[str], references: list[str]) -> float:
    return sacrebleu.corpus_chrf(lines, [references]).score
