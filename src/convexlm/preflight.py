"""What is looked at before a run folder is begun, so that a mistake is told before hours of training."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.dataset_names import dataset_path
from convexlm.errors import UserError
from convexlm.hub import refuse_shared_repository
from convexlm.instruction_file import said_of_placeholders
from convexlm.own_prompts import first_own_prompt, refuse_own_prompts
from convexlm.plan_data import names_a_file
from convexlm.run_data import NO_CORPUS, check_generated, datasets_of
from convexlm.same_sentences import check_whole
from convexlm.scoring import Scorer, said_of_words
from convexlm.spelled_config import check_model_of, spelled_config
from convexlm.sweep import read_instruction
from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction
from convexlm.testsets import TestSet, load_test_set

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from convexlm.recipe import Recipe
    from convexlm.runs import TrainedRun

_OF_DEVICES = ("deepspeed", "tf32", "activation_offloading")


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
    return [load_scored_set(spec, pair) for spec in specs for pair in spec["pairs"]]


def load_scored_set(spec: dict[str, Any], pair: str) -> TestSet:
    """A test set with references.

    Raises:
        UserError: as `load_test_set`, or there are no references to score against.
    """
    one = load_test_set(spec, pair, Path.cwd())
    if not one.references:
        raise UserError(f"test set `{one.name}`, {one.pair}: there are no `references` to score against")
    return one


def check_apart(test_sets: Sequence[TestSet], validation_sets: Sequence[TestSet]) -> None:
    """See that no validation set is a test set under another name, and no test set a part of another.

    Raises:
        UserError: more than half of a validation set's sentence pairs are those of a test set, or as `check_whole`.
    """
    for sets in (test_sets, validation_sets):
        check_whole(sets)
    for test in test_sets:
        seen = set(zip(test.sources, test.references[0], strict=True))
        for one in (one for one in validation_sets if one.pair == test.pair):
            shared = sum(pair in seen for pair in zip(one.sources, one.references[0], strict=True))
            if 2 * shared > len(one.sources):
                raise UserError(
                    f"validation set `{one.name}`, {one.pair}: {shared} of its {len(one.sources)} sentence pairs are "
                    f"in the test set `{test.name}`; name another, or say `selection: test`"
                )


def check_scoring(recipe: Recipe, sets: Sequence[TestSet]) -> None:
    """Make every scorer, and fill every instruction, that the sets will need, for a mistake would cost the training.

    Says where a metric counts words in a language that has no blanks between them.

    Raises:
        UserError: a tokenizer or a metric's library is missing, a metric cannot take the language, or a language has
            no name for the instruction.
    """
    from convexlm.progress import note

    instruction = read_instruction(recipe)
    if said := said_of_placeholders(instruction or ""):
        note(said)
    for one in sets:
        try:
            fill_instruction(TRANSLATION_INSTRUCTION if instruction is None else instruction, one.pair)
            Scorer(one.references, one.pair.split("-")[1], recipe.metrics)
        except UserError as error:
            raise UserError(f"test set `{one.name}`, {one.pair}: {error}") from None
    for language in dict.fromkeys(one.pair.split("-")[1] for one in sets):
        if said := said_of_words(language, recipe.metrics):
            note(said)


def check_files(recipe: Recipe) -> dict[str, int]:
    """Read the data and the instruction that a recipe names, and look for its model.

    Returns:
        How many records there are in every local dataset that was read to its end, by name.

    Raises:
        UserError: a file is missing or empty, a record cannot be used, there is no model in the model's folder, or one
            that could not be saved, or the config of a new one cannot be used.
    """
    from convexlm.instructions import load_records
    from convexlm.training_checks import check_saved_generation_config

    # A stream may be larger than memory: of it the first record has to do.
    streaming = recipe.data.get("streaming")
    template, limit = recipe.data.get("template", "alpaca"), recipe.data.get("max_records")
    counted = {}
    named = [
        ("data.dataset" if arm is None else f"arm `{arm.name}`: dataset", one) for arm, one in datasets_of(recipe)
    ]
    for where, dataset in [*named, ("data.eval_dataset", recipe.data.get("eval_dataset"))]:
        if isinstance(dataset, dict):
            check_generated(dataset)
        if not isinstance(dataset, str):
            continue
        evaluated = where == "data.eval_dataset"  # whole, whatever `max_records` says
        first_only = streaming and not evaluated
        path = dataset_path(dataset)
        if path.is_file() or (path.exists() and not first_only):
            most = None if evaluated else 1 if first_only else limit
            found = load_records(dataset, template=template, max_records=most)
            if not evaluated:
                refuse_own_prompts(first_own_prompt(found, template), f"{where} {dataset}", template)
            if not (first_only or evaluated):
                counted[dataset] = len(found)
        elif not path.exists() and names_a_file(dataset):
            raise UserError(f"{where} {dataset}: no such file")
    if recipe.model.get("tokenizer") == "tinyworld" and not isinstance(recipe.data["dataset"], dict):
        raise UserError(NO_CORPUS)
    if (config := spelled_config(recipe)) is not None:
        check_model_of(config)
    model = recipe.model.get("model_name_or_path")
    if model and model.startswith(("/", "./", "../")) and not Path(model).exists():
        raise UserError(f"model.model_name_or_path {model}: no such folder")
    if model and Path(model).exists():
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"model.model_name_or_path {model}: no model there (config.json is missing)")
        if not recipe.model.get("use_peft"):  # an adapter is saved without it
            check_saved_generation_config(Path(model))
    read_instruction(recipe)
    return counted


def check_decoding(recipe: Recipe, *, here: bool = True) -> None:
    """See that what is trained can be decoded as the recipe says.

    Args:
        recipe: the recipe.
        here: it will be decoded on this machine, which has to have the backend and the device.

    Raises:
        UserError: an unknown dtype or compute type, more new tokens than the model has positions, a backend that is
            not installed, or a device that is not here.
    """
    from convexlm.decoding.backends import get_backend
    from convexlm.decoding.checkpoint import choose_dtype
    from convexlm.run_checks import check_new_tokens

    keys = ("backend", "dtype", "compute_type", "device")
    name, dtype, compute_type, device = (recipe.decode.get(key) for key in keys)
    choose_dtype(Path(), "cpu", dtype)
    automatic = name == "auto"
    backend = get_backend("ctranslate2" if automatic else name or "hf")()  # the one that `auto` takes for its type
    if compute_type is not None and compute_type not in backend.compute_types:
        known = f"known: {', '.join(backend.compute_types)}" if backend.compute_types else "`ctranslate2` has them"
        raise UserError(f"decode.compute_type: the {backend.name} backend has no `{compute_type}`; {known}")
    if compute_type is not None and dtype is not None:
        raise UserError("decode: give `dtype` or `compute_type`, not both")
    share = recipe.decode.get("gpu_memory_utilization")
    if device not in (None, "auto"):
        _check_device(str(device), here=here)
    if here and not automatic:
        import torch

        first = "cuda" if torch.cuda.is_available() else "cpu"
        taken = first if device in (None, "auto") else str(device)
        backend.check_installed(taken)
        backend.check_gpu_memory(share, taken, recipe.decode.get("num_processes") or 1)
    elif share is not None:
        backend.check_gpu_memory(share, "cuda", 1)
    check_new_tokens(recipe)


def _check_device(name: str, *, here: bool) -> None:
    """See that torch has a device, without taking it, for that would hold a GPU's memory while others train."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UserError(f"decode.device: torch knows no device `{name}`") from None
    if here and kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"decode.device: there is no GPU here for `{name}`")


def check_trainings(
    recipe: Recipe,
    trainings: Sequence[tuple[TrainedRun, dict[str, Any]]],
    counted: Mapping[str, int],
    processes: int,
    *,
    here: bool = True,
) -> None:
    """Build the options of every arm, and see that it will leave the checkpoints that the recipe decodes.

    Args:
        recipe: the recipe.
        trainings: every run with its options.
        counted: records of datasets, as `check_files` returns them.
        processes: how many train together.
        here: they will train on this machine, so that what GPUs need has to be installed.

    Raises:
        UserError: a value that an option cannot have, no checkpoints, or none at a step of `decode.checkpoints`, or
            several runs that would be pushed to one repository.
    """
    refuse_shared_repository((run.name, options) for run, options in trainings)
    arms: set[str] = set()
    for run, options in trainings:
        if run.arm in arms:  # with another seed
            continue
        arms.add(run.arm)
        try:
            with _alone():
                _check_training(recipe, run, options, counted.get(str(options["dataset"])), processes, here)
        except UserError as error:
            raise UserError(f"arm `{run.arm}`: {error}") from None


def _check_training(
    recipe: Recipe, run: TrainedRun, options: Mapping[str, Any], records: int | None, processes: int, here: bool
) -> None:
    from convexlm.training_checks import check_numbers, check_settings
    from convexlm.training_model import check_model_options
    from convexlm.verbs.train import build_options

    # No device is taken here, and none is needed to tell.
    other = {key: value for key, value in options.items() if key not in _OF_DEVICES}
    data, model, config = build_options({**other, "use_cpu": True, "bf16": False, "fp16": False})
    check_model_options(model, data)
    check_numbers(config)
    if _word(config.save_strategy) == "no":
        raise UserError("`save_strategy: no` leaves no checkpoint to decode")
    if _word(config.eval_strategy) != "no" and not data.eval_dataset:
        raise UserError("`eval_strategy` needs `data.eval_dataset`")
    if data.streaming and config.max_steps <= 0:
        raise UserError("`data.streaming` needs `max_steps`: a stream does not say how long it is")
    check_settings(config, data, here=here)
    wanted = recipe.decode["checkpoints"]
    if isinstance(wanted, list) and recipe.arm(run.arm).decode:
        for step in wanted:
            if said := _why_never_saved(step, config, records, processes):
                raise UserError(f"decode.checkpoints: {run.name} will have no checkpoint at step {step} ({said})")


def _why_never_saved(step: int, config: Any, records: int | None, processes: int) -> str | None:
    """Why a training will not leave a checkpoint at a step; None where it will, or may."""
    from convexlm.plan_training import checkpoint_steps, saved_steps, steps_of_epoch

    if config.max_steps > 0:
        epoch = None if records is None or config.packing else steps_of_epoch(config, records, processes)
        saved = saved_steps(config, config.max_steps, epoch)
        if saved and step not in saved:
            return f"it saves at {_listed(saved)}"
        kept = checkpoint_steps(config, config.max_steps, epoch)
        return None if not saved or step in kept or config.load_best_model_at_end else f"it keeps {_listed(kept)}"
    if records is None or config.packing:
        return None
    epoch = steps_of_epoch(config, records, processes)
    last = math.ceil(config.num_train_epochs * epoch)
    if step > last:
        return f"it takes {last} steps"
    # Records without room for an answer are dropped, so the last step may come sooner, but hardly by half.
    if _word(config.save_strategy) == "steps" and config.save_steps >= 1 and step % config.save_steps:
        return f"it saves every {config.save_steps:g} steps" if 2 * step < last else None
    return None


def _word(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide a launcher's variables, for training options look for its processes, and undo what they set themselves."""
    before = dict(os.environ)
    for name in before:
        if name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") or name.startswith("ACCELERATE_"):
            del os.environ[name]
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
