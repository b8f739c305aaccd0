"""The sentences of a run for the page's browser: sources, references, every arm's hypotheses, sentence chrF.

A page holds so many bytes of them. Where a run has more, half of the room goes to the sentences whose chrF differs
most between the baseline and another arm, the other half to a random sample of the rest, and the page says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_jsonl, text_sha256
from convexlm.report.data import read_references
from convexlm.report.text import script_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.report.data import RunData
    from convexlm.runs import TrainedRun

ROOM = 2_300_000  # bytes of JSON on the page
MAX_TEXT = 4_000  # characters of one text; what is cut is counted behind it
MAX_SCORED = 40_000  # hypotheses that get a sentence score; chrF takes about half a millisecond each
SAMPLE_SEED = 12345


@dataclass
class Item:
    """One source sentence of one test set with all its hypotheses.

    Attributes:
        corpus: index of (test set, pair) in the book.
        id: the sentence's id.
        source: its source.
        references: none, or one a stream.
        texts: the different hypotheses.
        cells: for every (arm, search, seed), arms outermost, the index into `texts`; -1 where there is none.
        cut: the cells whose hypothesis ran into the length limit.
        scores: chrF of every text, or None without a reference.
    """

    corpus: int
    id: str
    source: str
    references: list[str]
    texts: list[str] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    scores: list[float] | None = None

    def as_list(self) -> list[Any]:
        """What the page gets: a list, since keys would be repeated with every sentence."""
        clipped = [_clip(text) for text in self.texts]
        scores = None if self.scores is None else [round(score, 1) for score in self.scores]
        references = [_clip(text) for text in self.references]
        return [self.corpus, self.id, _clip(self.source), references, clipped, self.cells, scores, self.cut]


@dataclass(frozen=True)
class Book:
    """What the browser of sentences shows: `payload` is JSON-ready; `shown` of `total` sentences are in it.

    They were taken from `scored` ones, a random part where there are too many for sentence scores.
    """

    payload: dict[str, Any]
    shown: int
    total: int
    scored: int
    has_references: bool
    missing: list[str]


def read_sentences(run: RunData, room: int = ROOM) -> Book:
    """Read the decode files at the checkpoints that were compared, as many sentences as fit into `room` bytes.

    Raises:
        UserError: a decode file has another number of sentences or other sources than the comparison or its fellows,
            or it or the references are not what was scored.
    """
    references = read_references(run)
    items: list[Item] = []
    missing: list[str] = []
    corpora = run.comparison["corpora"]
    for index, corpus in enumerate(corpora):
        streams = references.get((corpus["test_set"], corpus["pair"]), [])
        items += _read_corpus(run, index, corpus, streams, missing)
    total = len(items)
    items = _scored(items, len(run.comparison["searches"]) * len(run.comparison["seeds"]))
    scored = len(items)
    items = _fitting(run, items, room)
    payload = {
        "arms": run.arms,
        "styles": [run.style(arm) for arm in run.arms],
        "searches": run.comparison["searches"],
        "seeds": run.comparison["seeds"],
        "corpora": [f"{corpus['test_set']} {corpus['pair']}" for corpus in corpora],
        "items": [item.as_list() for item in items],
    }
    return Book(payload, len(items), total, scored, any(item.scores is not None for item in items), missing)


def _read_corpus(
    run: RunData, index: int, corpus: dict[str, Any], streams: Sequence[Sequence[str]], missing: list[str]
) -> list[Item]:
    items: list[Item] = []
    for arm in run.arms:
        for search in run.comparison["searches"]:
            for one in (one for one in run.runs if one.arm == arm):
                path = run.folder.decode(
                    one, run.checkpoint(one) or "", corpus["test_set"], corpus["pair"], str(search)
                )
                if not path.is_file():
                    missing.append(str(path.relative_to(run.path)))
                    for item in items:
                        item.cells.append(-1)
                    continue
                rows = list(read_jsonl(path))
                if not items:
                    before = len(run.comparison["searches"]) * len(run.comparison["seeds"]) * run.arms.index(arm)
                    before += len(run.comparison["seeds"]) * run.comparison["searches"].index(search)
                    before += run.comparison["seeds"].index(one.seed)
                    items = [_item(index, row, [-1] * before) for row in rows]
                    _add_references(items, streams, corpus)
                if len(rows) != len(items) or len(rows) != corpus.get("num_sentences", len(rows)):
                    raise UserError(
                        f"{path}: has {len(rows)} sentences where the comparison has "
                        f"{corpus.get('num_sentences', len(items))}; run the recipe again"
                    )
                for item, row in zip(items, rows, strict=True):
                    _add_hypothesis(item, row, str(path))
                _check_scored(run, one, corpus, str(search), path, rows, streams)
    return items


def _check_scored(
    run: RunData,
    one: TrainedRun,
    corpus: dict[str, Any],
    search: str,
    path: Path,
    rows: list[dict[str, Any]],
    streams: Sequence[Sequence[str]],
) -> None:
    """See that a decode file and its references are those of the scores, or the page would show other sentences."""
    place = (one.arm, one.seed, run.checkpoint(one), corpus["test_set"], corpus["pair"], search)
    scored = run.scored_hashes.get(place)
    if scored is None:
        return
    again = "has changed since it was scored; run the recipe again"
    if text_sha256(str(row.get("hypothesis", "")).replace("\n", " ") for row in rows) != scored[0]:
        raise UserError(f"{path}: {again}")
    if streams and [text_sha256(stream) for stream in streams] != scored[1]:
        raise UserError(f"{run.folder.references}, {corpus['test_set']} {corpus['pair']}: {again}")


def _item(index: int, row: dict[str, Any], cells: list[int]) -> Item:
    return Item(index, str(row.get("id", "")), str(row.get("source", "")), [], cells=cells)


def _add_references(items: list[Item], streams: Sequence[Sequence[str]], corpus: dict[str, Any]) -> None:
    for stream in streams:
        if len(stream) != len(items):
            raise UserError(
                f"data/references.jsonl: {corpus['test_set']} {corpus['pair']} has {len(stream)} references for "
                f"{len(items)} sources"
            )
        for item, text in zip(items, stream, strict=True):
            item.references.append(text)


def _add_hypothesis(item: Item, row: dict[str, Any], path: str) -> None:
    if str(row.get("source", "")) != item.source:
        raise UserError(f"{path}: sentence {item.id} has another source than in the other decode files")
    text = str(row.get("hypothesis", ""))
    if text not in item.texts:
        item.texts.append(text)
    if row.get("finished") is False:
        item.cut.append(len(item.cells))
    item.cells.append(item.texts.index(text))


def _scored(items: list[Item], cells_an_arm: int) -> list[Item]:
    """The items with their chrF; a random part of them where there are too many to score."""
    from sacrebleu.metrics import CHRF

    hypotheses = sum(len(item.texts) for item in items)
    if hypotheses > MAX_SCORED:
        count = max(1, len(items) * MAX_SCORED // hypotheses)
        kept = sorted(Random(SAMPLE_SEED).sample(range(len(items)), count))
        items = [items[index] for index in kept]
    metric = CHRF()
    for item in items:
        if item.references:
            references = [_clip(text) for text in item.references]
            item.scores = [metric.sentence_score(_clip(text), references).score for text in item.texts]
    return items


def _fitting(run: RunData, items: list[Item], room: int) -> list[Item]:
    """As many items as fit: the largest differences and a random sample, in their first order."""
    sizes = [len(script_json(item.as_list()).encode("utf-8")) + 1 for item in items]
    if sum(sizes) <= room:
        return items
    chosen: set[int] = set()
    by_difference = sorted(range(len(items)), key=lambda index: (-_difference(run, items[index]), index))
    by_chance = list(range(len(items)))
    Random(SAMPLE_SEED).shuffle(by_chance)
    used = 0
    for order, limit in ((by_difference, room // 2 if items[0].scores else 0), (by_chance, room)):
        for index in order:
            if index not in chosen and used + sizes[index] <= limit:
                chosen.add(index)
                used += sizes[index]
    return [items[index] for index in sorted(chosen)]


def _difference(run: RunData, item: Item) -> float:
    """The largest difference in chrF of any arm from the baseline, under one search and seed."""
    if item.scores is None:
        return 0.0
    width = len(item.cells) // len(run.arms)
    values = [item.scores[cell] if cell >= 0 else None for cell in item.cells]
    pairs = [(values[index], values[index % width]) for index in range(width, len(values))]
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]} […{len(text) - MAX_TEXT} more characters]"
