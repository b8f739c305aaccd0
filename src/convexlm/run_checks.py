"""What is looked at in a run folder before its first training: what was decoded before, and how long prompts are."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_json_object, text_sha256
from convexlm.positions import positions_of
from convexlm.sweep import read_instruction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.recipe import Recipe
    from convexlm.runs import RunFolder
    from convexlm.testsets import TestSet


def check_decoded(folder: RunFolder, sets: Sequence[TestSet]) -> None:
    """See that what was decoded in earlier calls was decoded from the sources that are there now.

    Raises:
        UserError: the sources of a set have changed since.
    """
    now = {(one.name, one.pair): text_sha256(one.sources) for one in sets}
    for file in sorted((folder.path / "decode").glob("*/*/*.meta.json")):
        try:
            meta = read_json_object(file)
        except UserError:  # told where it is needed
            continue
        place = (meta.get("test_set"), meta.get("pair"))
        if place in now and meta.get("sources_sha256") not in (None, now[place]):
            raise UserError(
                f"test set `{place[0]}`, {place[1]}: its sources have changed since {file.parent} was decoded from "
                "them; put them back, or choose another --run_dir"
            )


def _positions(recipe: Recipe) -> int | None:
    """How many positions the recipe's model says it has; None where that is not known."""
    from convexlm.spelled_config import spelled_config

    config: Any = spelled_config(recipe)
    model = recipe.model.get("model_name_or_path")
    if config is None and model and Path(str(model)).is_dir():
        from transformers import AutoConfig

        with contextlib.suppress(Exception):  # whatever is wrong with it, loading the model will tell
            config = AutoConfig.from_pretrained(str(model))
    if config is None:
        return None
    return positions_of(config)


def most_new_tokens(recipe: Recipe) -> int:
    """The largest `max_new_tokens` of the recipe's searches."""
    from convexlm.decoding.search import Search

    return max(Search.from_mapping(one).max_new_tokens for one in recipe.decode["searches"])


def check_new_tokens(recipe: Recipe) -> None:
    """See that the model has more positions than an answer may have tokens, whatever the prompts.

    Raises:
        UserError: it has not.
    """
    positions, most = _positions(recipe), most_new_tokens(recipe)
    if positions is not None and most >= positions and any(arm.decode for arm in recipe.arms):
        raise UserError(
            f"decode.searches: max_new_tokens {most} leaves no room for a prompt: the model has {positions} positions"
        )


def check_lengths(recipe: Recipe, folder: RunFolder, sets: Sequence[TestSet]) -> None:
    """See that every prompt of the sets has room for the longest answer, once there is a tokenizer.

    A tokenizer that cannot be loaded, or a template that does not go with it, is left to training, which tells more.

    Raises:
        UserError: a prompt does not fit.
    """
    from convexlm import tokenization
    from convexlm.decoding.job import DecodeJob
    from convexlm.decoding.search import Search

    positions, most = _positions(recipe), most_new_tokens(recipe)
    if positions is None:
        return
    named = recipe.model.get("tokenizer") or recipe.model.get("model_name_or_path")
    source = str(folder.data / "tokenizer") if named == "tinyworld" else str(named)
    template = recipe.data.get("template", "alpaca")
    try:
        tokenizer = tokenization.load_tokenizer(source)
        settings = tokenization.PromptSettings(template=template, add_bos=recipe.data.get("add_bos"))
        settings = settings.resolve(tokenizer)
        instruction = read_instruction(recipe)
        jobs = [DecodeJob(one, Search(), Path("unused.jsonl"), settings, instruction) for one in sets]
        encoded = [tokenization.encode_prompts(tokenizer, job.prompts(), settings) for job in jobs]
    except UserError:
        return
    for one, prompts in zip(sets, encoded, strict=True):
        for name, ids in zip(one.ids, prompts, strict=True):
            if len(ids) + most > positions:
                raise UserError(
                    f"test set `{one.name}`, {one.pair}: the prompt of sentence {name} has {len(ids)} tokens; with "
                    f"max_new_tokens {most} (decode.searches) that is more than the model's {positions} positions"
                )
