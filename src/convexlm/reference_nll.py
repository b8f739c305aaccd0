"""How unlikely the references of a test set are under the model that training started from.

It parts easy sentences from hard ones by the same ruler for all arms: the model before any of them was trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import json_sha256, text_sha256, write_atomic
from convexlm.positions import positions_of
from convexlm.progress import note
from convexlm.runs import DONE_FILE, TrainedRun, read_done, run_name
from convexlm.scoring import first_references
from convexlm.sweep import read_instruction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexlm.recipe import Recipe
    from convexlm.runs import RunFolder
    from convexlm.testsets import TestSet


@dataclass(frozen=True)
class ReferenceNll:
    """The measure, by (test set, pair, seed): a value a sentence, in nats a target token.

    Attributes:
        values: None for a sentence that is too long or has no reference; empty where there is no model to measure
            with.
        base: the model, as the recipe names it.
        reason: why there are no values.
    """

    values: dict[tuple[str, str, int], list[float | None]] = field(default_factory=dict)
    base: str | None = None
    reason: str | None = None


def reference_nll(recipe: Recipe, folder: RunFolder, test_sets: Sequence[TestSet]) -> ReferenceNll:
    """Measure the first reference of every sentence with the model that the baseline arm starts from.

    What was measured before, for the same model and texts, is read from the run folder. A model that cannot be loaded
    is no error here, for nothing else depends on it: the reason is kept instead.
    """
    if not recipe.compare.get("reference_nll", True):
        return ReferenceNll(reason="the recipe says `reference_nll: false`")
    start = recipe.arm(recipe.baseline).init_from
    name = start or recipe.model.get("model_name_or_path")
    if not name:
        return ReferenceNll(reason=f"`{recipe.baseline}` is trained from a new model, which knows nothing yet")
    values: dict[tuple[str, str, int], list[float | None]] = {}
    try:
        for seed in recipe.seeds if start else recipe.seeds[:1]:
            base = _trained(folder, start, seed, recipe) if start else _at_hand(str(name))
            for test_set, found in zip(test_sets, _measured(recipe, folder, base, test_sets), strict=True):
                for one in [seed] if start else recipe.seeds:
                    values[test_set.name, test_set.pair, one] = found
    except UserError as error:
        note(f"  no scores by reference NLL: {error}")
        return ReferenceNll(base=str(name), reason=str(error))
    return ReferenceNll(values, base=str(name))


def _trained(folder: RunFolder, arm: str, seed: int, recipe: Recipe) -> Path:
    """The last checkpoint of the arm that others start from."""
    path = folder.train(TrainedRun(arm, seed, run_name(recipe, arm, seed)))
    if not (path / DONE_FILE).exists():
        raise UserError(f"{path}: its training is not done")
    return path / str(read_done(path)["checkpoints"][-1])


def _at_hand(name: str) -> Path:
    """The folder of a model that was trained from, without asking the hub again."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the hub's own errors are many, and all mean that it is not in its cache
        raise UserError(f"the model `{name}` is not at hand") from None


def _measured(recipe: Recipe, folder: RunFolder, base: Path, test_sets: Sequence[TestSet]) -> list[list[float | None]]:
    """The values of every test set; loads the model only if some are not in the run folder."""
    from convexlm.decoding.checkpoint import check_checkpoint, checkpoint_sha256, choose_device, choose_dtype

    check_checkpoint(base)
    device = choose_device(recipe.decode.get("device"))
    dtype = choose_dtype(base, device, recipe.decode.get("dtype"))
    digest = checkpoint_sha256(base)
    settings = {key: recipe.data.get(key) for key in ("template", "add_bos")}
    asked = [digest, dtype, settings, read_instruction(recipe), recipe.model.get("tokenizer")]
    files = []
    for one in test_sets:
        if not one.references:
            raise UserError(f"test set `{one.name}`, {one.pair}: there are no references")
        key = json_sha256([*asked, one.pair, text_sha256(one.sources), text_sha256(first_references(one.references))])
        files.append(folder.data / f"reference_nll.{one.name}.{one.pair}.{key[:12]}.json")
    known = [_read(path, len(one.sources)) for path, one in zip(files, test_sets, strict=True)]
    if all(values is not None for values in known):
        return [values for values in known if values is not None]
    model, tokenizer, prompts = _load(recipe, folder, base, device, dtype)
    found = []
    for path, one, values in zip(files, test_sets, known, strict=True):
        if values is None:
            note(f"  reference NLL of {one.name} {one.pair} under {base.name}")
            values = _values(model, tokenizer, prompts, read_instruction(recipe), one)
            write_atomic(path, json.dumps({"model_sha256": digest, "dtype": dtype, "nll": values}) + "\n")
        found.append(values)
    return found


def _read(path: Path, count: int) -> list[float | None] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["nll"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values if isinstance(values, list) and len(values) == count else None


def _load(recipe: Recipe, folder: RunFolder, base: Path, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and how training makes prompts."""
    import torch

    from convexlm import tokenization
    from convexlm.decoding.checkpoint import has_prompt_settings
    from convexlm.decoding.loading import load_model, load_tokenizer

    named = recipe.model.get("tokenizer")
    if named:
        source = str(folder.data / "tokenizer") if named == "tinyworld" else str(named)
        tokenizer = tokenization.load_tokenizer(source)
    else:
        tokenizer = load_tokenizer(base)
    if has_prompt_settings(base):
        settings = tokenization.PromptSettings.load(base)
    else:
        template = recipe.data.get("template", "alpaca")
        settings = tokenization.PromptSettings(template=template, add_bos=recipe.data.get("add_bos"))
    return load_model(base, device, getattr(torch, dtype)), tokenizer, settings.resolve(tokenizer)


def _values(model: Any, tokenizer: Any, settings: Any, instruction: str | None, test_set: TestSet) -> list[Any]:
    """The mean negative log-probability of every first reference and its EOS, given the prompt that is decoded.

    None for a sentence without one, or whose row is longer than the model's positions.
    """
    from convexlm.decoding import DecodeJob, Search
    from convexlm.diagnosis.measure import measure
    from convexlm.instructions import Record
    from convexlm.tokenization import answer_end, tokenize_records

    job = DecodeJob(test_set, Search(), Path("unused.jsonl"), settings, instruction)
    pairs = enumerate(zip(job.prompts(), first_references(test_set.references), strict=True))
    records = [Record(prompt, text, id=str(number)) for number, (prompt, text) in pairs if text]
    positions = positions_of(model.config)
    tokenized = tokenize_records(records, tokenizer, settings, None)
    rows = [row for row in tokenized.rows if not positions or len(row["input_ids"]) <= positions]
    values: list[float | None] = [None] * len(test_set.sources)
    if rows:
        means = measure(model, rows, eos_token_id=answer_end(tokenizer, settings)).m
        for row, mean in zip(rows, means, strict=True):
            values[int(row["record_id"])] = -float(mean)
    return values
