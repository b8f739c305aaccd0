"""With which settings a result was made: recipe, versions, signatures, checkpoints, every score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from convexlm.report.text import metric_title

if TYPE_CHECKING:
    from convexlm.report.data import RunData

MAX_ROWS = 400  # of scores.jsonl that the page lists


@dataclass(frozen=True)
class Settings:
    """What the last part of a report says.

    Attributes:
        recipe: the resolved recipe as YAML.
        versions: (package, version).
        signatures: (metric, target language or corpora, signature), each once.
        checkpoints: (run, checkpoint that was compared).
        scores: the first `MAX_ROWS` rows of scores.jsonl.
        num_scores: how many rows there are.
    """

    recipe: str
    versions: list[tuple[str, str]]
    signatures: list[tuple[str, str, str]]
    checkpoints: list[tuple[str, str]]
    scores: list[dict[str, Any]]
    num_scores: int


def read_settings(run: RunData) -> Settings:
    """Gather a run's settings."""
    used: dict[tuple[str, str], list[str]] = {}
    for row in run.scores:
        where = used.setdefault((str(row.get("metric")), str(row.get("signature"))), [])
        if row.get("pair") not in where:
            where.append(str(row.get("pair")))
    versions = dict(run.versions)
    for row in run.scores:
        for name, version in (row.get("versions") or {}).items():
            versions.setdefault(str(name), str(version))
    return Settings(
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100),
        versions=sorted(versions.items()),
        signatures=[(metric_title(metric), ", ".join(where), text) for (metric, text), where in used.items()],
        checkpoints=[(name, str(checkpoint)) for name, checkpoint in run.comparison["checkpoints"].items()],
        scores=run.scores[:MAX_ROWS],
        num_scores=len(run.scores),
    )
