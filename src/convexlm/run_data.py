"""What a recipe generates into its run folder before training: a corpus, its tokenizer, a new model's config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import to_json_line, write_atomic, write_jsonl

if TYPE_CHECKING:
    from pathlib import Path

    from convexlm.recipe import Arm, Recipe
    from convexlm.runs import RunFolder
    from convexlm.testsets import TestSet

NO_CORPUS = "model.tokenizer: `tinyworld` is trained on a generated corpus; give data.dataset {kind: tinyworld}"


def prepare_data(recipe: Recipe, folder: RunFolder) -> str:
    """Write what the recipe generates (a corpus, its tokenizer, a new model's config); says what was done."""
    said = []
    for arm, dataset in datasets_of(recipe):
        if isinstance(dataset, dict):
            path = dataset_file(recipe, folder, arm)
            if path.exists():
                said.append(f"{path.name} (done)")
            else:
                rows = generate(dataset)
                write_jsonl(path, rows)
                said.append(f"{path.name}: {len(rows)} records")
        else:
            said.append(str(dataset))
    if recipe.model.get("tokenizer") == "tinyworld" and not (folder.data / "tokenizer" / "tokenizer.json").exists():
        _train_tokenizer(recipe, folder)
    if recipe.model.get("config"):
        config_file = folder.data / "model" / "config.json"
        if not config_file.exists():
            write_atomic(config_file, json.dumps(recipe.model["config"], indent=2, sort_keys=True) + "\n")
    return ", ".join(dict.fromkeys(said))


def write_references(folder: RunFolder, test_sets: list[TestSet]) -> None:
    """Keep what the hypotheses are scored against beside them, for the report and for whoever gets the folder."""
    rows = [{"test_set": t.name, "pair": t.pair, "references": t.references} for t in test_sets]
    text = "".join(map(to_json_line, rows))
    if not folder.references.exists() or folder.references.read_bytes() != text.encode():
        write_atomic(folder.references, text)


def datasets_of(recipe: Recipe) -> list[tuple[Arm | None, Any]]:
    """What a recipe names as training data, each with its arm; None is the arms that name none of their own."""
    return [(None, recipe.data["dataset"]), *((arm, arm.dataset) for arm in recipe.arms if arm.dataset)]


def dataset_file(recipe: Recipe, folder: RunFolder, arm: Arm | None) -> Path:
    """Where generated data go: an arm's own, or those of the whole recipe."""
    return folder.data / (f"train.{arm.name}.jsonl" if arm else "train.jsonl")


def dataset_of(recipe: Recipe, folder: RunFolder, arm: Arm) -> str:
    """The file or hub name that an arm is trained on."""
    own = arm.dataset is not None
    dataset = arm.dataset if own else recipe.data["dataset"]
    return str(dataset_file(recipe, folder, arm if own else None)) if isinstance(dataset, dict) else str(dataset)


def check_generated(spec: dict[str, Any]) -> None:
    """See that a mapping in place of a dataset describes one.

    Raises:
        UserError: it does not.
    """
    from convexlm.tinyworld import DIRECTIONS

    known = {"kind", "directions", "size", "seed", "noise"}
    if spec.get("kind") != "tinyworld" or set(spec) - known:
        raise UserError(
            f"data.dataset: {spec} is not understood; generated data is {{kind: tinyworld, {sorted(known)}}}"
        )
    directions = spec.get("directions", ["en-de"])
    if not isinstance(directions, list) or not directions:
        raise UserError(f"data.dataset: `directions` is a list such as [en-de], not {directions!r}")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise UserError(f"data.dataset: tinyworld has no direction {direction}; it has: {', '.join(DIRECTIONS)}")
    for key, kinds in (("size", int), ("seed", int), ("noise", (int, float))):
        if key in spec and (isinstance(spec[key], bool) or not isinstance(spec[key], kinds)):
            raise UserError(f"data.dataset: `{key}` is a number, not {spec[key]!r}")
    if spec.get("size", len(directions)) < len(directions):
        raise UserError(f"data.dataset: `size` is at least 1 for each of `directions`, not {spec['size']}")
    if not 0 <= spec.get("noise", 0) <= 1:
        raise UserError(f"data.dataset: `noise` is a share from 0 to 1, not {spec['noise']}")


def generate(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The records that a mapping in place of a dataset describes.

    Raises:
        UserError: it describes none.
    """
    from random import Random

    from convexlm.tinyworld import records, sample_corpus

    check_generated(spec)
    directions = spec.get("directions", ["en-de"])
    size, seed, noise = spec.get("size", 20000), spec.get("seed", 1), spec.get("noise", 0.0)
    try:
        rows = [
            record
            for direction in directions
            for record in records(sample_corpus(direction, size // len(directions), seed, noise), direction)
        ]
    except (ValueError, TypeError) as error:
        raise UserError(f"data.dataset: {error}") from None
    Random(seed).shuffle(rows)
    return rows


def _train_tokenizer(recipe: Recipe, folder: RunFolder) -> None:
    from convexlm.files import read_jsonl
    from convexlm.tinyworld.tokenizer import train_tokenizer

    path = dataset_file(recipe, folder, None)
    if not path.exists():
        raise UserError(NO_CORPUS)
    texts = [text for row in read_jsonl(path) for text in (row["input"], row["output"])]
    tokenizer = train_tokenizer(texts, template=recipe.data.get("template", "alpaca"))
    staging = folder.data / ".tokenizer"
    tokenizer.save_pretrained(staging)
    staging.rename(folder.data / "tokenizer")
