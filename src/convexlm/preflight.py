"""What is looked at before a run folder is begun, so that a mistake is told before hours of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.run_data import datasets_of
from convexlm.sweep import read_instruction
from convexlm.testsets import TestSet, load_test_set

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.recipe import Recipe


def load_test_sets(recipe: Recipe) -> list[TestSet]:
    """Every (test set, pair) of a recipe, paths relative to the current folder.

    Raises:
        UserError: as `load_test_set`, or there are no references to score against.
    """
    return _load_sets(recipe.test_sets)


def load_validation_sets(recipe: Recipe) -> list[TestSet]:
    """Every (validation set, pair) of a recipe, as `load_test_sets` reads test sets."""
    return _load_sets(recipe.validation_sets)


def _load_sets(specs: Sequence[dict[str, Any]]) -> list[TestSet]:
    sets = [load_test_set(spec, pair, Path.cwd()) for spec in specs for pair in spec["pairs"]]
    for one in sets:
        if not one.references:
            raise UserError(f"test set `{one.name}`, {one.pair}: there are no `references` to score against")
    return sets


def check_apart(test_sets: Sequence[TestSet], validation_sets: Sequence[TestSet]) -> None:
    """See that no validation set is a test set under another name.

    Raises:
        UserError: more than half of a validation set's sentence pairs are those of a test set.
    """
    for test in test_sets:
        seen = set(zip(test.sources, test.references[0], strict=True))
        for one in (one for one in validation_sets if one.pair == test.pair):
            shared = sum(pair in seen for pair in zip(one.sources, one.references[0], strict=True))
            if 2 * shared > len(one.sources):
                raise UserError(
                    f"validation set `{one.name}`, {one.pair}: {shared} of its {len(one.sources)} sentence pairs are "
                    f"in the test set `{test.name}`; name another, or say `selection: test`"
                )


def check_files(recipe: Recipe) -> None:
    """Read the training data and the instruction that a recipe names, and look for its model.

    Raises:
        UserError: a file is missing or empty, a record cannot be used, or there is no model in the model's folder.
    """
    from convexlm.instructions import load_records

    # A stream may be larger than memory: of it the first record has to do.
    limit = 1 if recipe.data.get("streaming") else recipe.data.get("max_records")
    for _, dataset in datasets_of(recipe):
        here = isinstance(dataset, str) and Path(dataset).exists()
        if here and (Path(dataset).is_file() or not recipe.data.get("streaming")):
            load_records(dataset, template=recipe.data.get("template", "alpaca"), max_records=limit)
        elif (
            isinstance(dataset, str)
            and not here
            and (Path(dataset).suffix in (".json", ".jsonl", ".gz") or dataset.startswith(("/", "./", "../")))
        ):
            raise UserError(f"data.dataset {dataset}: no such file")
    model = recipe.model.get("model_name_or_path")
    if model and Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise UserError(f"model.model_name_or_path {model}: no model there (config.json is missing)")
    read_instruction(recipe)
