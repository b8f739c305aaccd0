"""From the run folders of one experiment to flat rows, one a score, as `results/evidence.jsonl` keeps them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

KEPT = ("seed", "test_set", "pair", "search", "metric", "score", "signature", "num_sentences")


def collect(folder: Path, experiment: str) -> list[dict[str, Any]]:
    """The rows of an experiment's finished run folders.

    Args:
        folder: holds `data/data.json` and the run folders `base`, `tune`, `final-seedN`; those without scores do not
            count.
        experiment: its name.

    Returns:
        One row a score with `experiment`, `stage`, `role` (`validation` or `test`), `arm`, `objective`, `k`, `seed`,
        `pair`, `test_set`, `search`, `metric`, `score`, `learning_rate`, `step`, `selected` (whether arms are
        compared at this checkpoint), `noise`, `noise_share`, `minutes` (of training, wall-clock), `signature`,
        `versions`.
    """
    data = json.loads((folder / "data" / "data.json").read_text(encoding="utf-8"))
    out: list[dict[str, Any]] = []
    for stage in ("base", "tune", "final"):
        about = {
            "experiment": experiment,
            "stage": stage,
            "noise": data.get("noise"),
            "noise_share": data.get("share"),
        }
        about |= {key: data[key] for key in ("variants",) if key in data}
        for run in sorted(path.parent for path in folder.glob(f"{stage}*/scores.jsonl")):
            out += [about | row for row in run_rows(run, validation_only=stage == "tune")]
    return out


def run_rows(run: Path, *, validation_only: bool = False) -> list[dict[str, Any]]:
    """The scores of one run folder, each with the settings of its arm.

    Args:
        run: the run folder.
        validation_only: its `test_sets` are validation sets, as in a tuning run, whose arms are named `ARM.lrRATE`.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    chosen = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["checkpoints"]
    out = []
    for row in read_jsonl(run / "scores.jsonl"):
        options = {**recipe["train"], **recipe["arms"][row["arm"]]}
        name = row["arm"] if len(recipe["seeds"]) == 1 else f"{row['arm']}.seed{row['seed']}"
        done = json.loads((run / "train" / name / "done.json").read_text(encoding="utf-8"))
        out.append(
            {
                "arm": row["arm"].rpartition(".lr")[0] if validation_only else row["arm"],
                "role": "validation" if validation_only else row["role"],
                "objective": options["objective"],
                "k": options.get("k"),
                **{key: row[key] for key in KEPT},
                "learning_rate": options["learning_rate"],
                "step": int(row["checkpoint"].rsplit("-", 1)[1]),
                "selected": not validation_only and chosen[name] == row["checkpoint"],
                "minutes": round(done["seconds"] / 60, 2),
                "versions": recipe["versions"],
            }
        )
    return out


def replace_experiment(path: Path, experiment: str, fresh: list[dict[str, Any]]) -> None:
    """Put an experiment's rows into a file, in place of its old ones.

    Their `versions` go into FILE-versions.json beside it, once an experiment: a list, as its run folders may differ.

    Args:
        path: a JSON Lines file of rows; it need not exist.
        experiment: whose rows they are.
        fresh: from `collect`.
    """
    old = [row for row in read_jsonl(path) if row["experiment"] != experiment] if path.exists() else []
    beside = path.with_name(f"{path.stem}-versions.json")
    versions = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    found = {json.dumps(row["versions"], sort_keys=True): row["versions"] for row in fresh}
    versions[experiment] = [found[key] for key in sorted(found)]
    beside.write_text(json.dumps(versions, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write_jsonl(path, [*old, *({key: row[key] for key in row if key != "versions"} for row in fresh)])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every record of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """The records as JSON Lines, the file whole or as it was."""
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    staging = path.with_suffix(".tmp")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
