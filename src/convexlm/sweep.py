"""The decode stage of a run: which checkpoints meet which sets, and which checkpoint is chosen.

Where a recipe selects on validation sets, the candidates are decoded on those only, the best of every arm and seed is
written to `selection.json`, and the test sets are decoded from that one alone.
"""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, text_sha256, write_atomic
from convexlm.instruction_file import read_instruction_file
from convexlm.live_scores import LiveScores
from convexlm.progress import note
from convexlm.runs import read_done

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.recipe import Recipe
    from convexlm.runs import RunFolder, TrainedRun
    from convexlm.testsets import TestSet

    Candidates = list[tuple[TrainedRun, Path]]

SCHEMA = 1  # of selection.json


def decode_stage(
    recipe: Recipe,
    folder: RunFolder,
    runs: Sequence[TrainedRun],
    test_sets: Sequence[TestSet],
    validation_sets: Sequence[TestSet] = (),
) -> None:
    """Decode whatever is not decoded yet, and choose checkpoints where the recipe asks for it.

    Raises:
        UserError: as `decode_jobs` and `decoded_checkpoints`.
    """
    candidates = candidate_checkpoints(recipe, folder, runs)
    searches = [dict(options) for options in recipe.decode["searches"]]
    if recipe.selection["on"] == "validation":
        chosen_by = [options for options in searches if _name(options) == recipe.selection["search"]]
        _decode(recipe, folder, candidates, validation_sets, chosen_by, "[3/5] decode validation")
        chosen = select_checkpoints(recipe, folder, runs, validation_sets)
        _say_chosen(recipe, chosen)
        candidates = [(run, path) for run, path in candidates if chosen[run.name] == path.name]
    _decode(recipe, folder, candidates, test_sets, searches, "[3/5] decode")
    if recipe.selection["on"] == "test":
        _say_chosen(recipe, select_checkpoints(recipe, folder, runs, test_sets))


def decoded_checkpoints(recipe: Recipe, folder: RunFolder, run: TrainedRun) -> list[Path]:
    """The checkpoints of a run that `decode.checkpoints` names: what is decoded, or chosen from.

    Raises:
        UserError: the recipe asks for a step that was not saved, or `done.json` is damaged.
    """
    names = read_done(folder.train(run))["checkpoints"]
    wanted = recipe.decode["checkpoints"]
    if wanted == "last":
        names = names[-1:]
    elif wanted != "all":
        chosen = [f"checkpoint-{step}" for step in wanted]
        if missing := [name for name in chosen if name not in names]:
            raise UserError(f"decode.checkpoints: {run.name} has no {missing[0]}; it has: {', '.join(names)}")
        names = chosen
    return [folder.train(run) / name for name in names]


def candidate_checkpoints(recipe: Recipe, folder: RunFolder, runs: Sequence[TrainedRun]) -> Candidates:
    """Every (run, checkpoint) of the arms that are decoded."""
    return [
        (run, checkpoint)
        for run in runs
        if recipe.arm(run.arm).decode
        for checkpoint in decoded_checkpoints(recipe, folder, run)
    ]


def chosen_checkpoints(
    recipe: Recipe,
    folder: RunFolder,
    runs: Sequence[TrainedRun],
    test_sets: Sequence[TestSet],
    validation_sets: Sequence[TestSet] = (),
) -> dict[str, str]:
    """The checkpoint at which every run is compared, by the run's name: the last one, or the one selected."""
    if recipe.selection["on"] != "last":
        sets = validation_sets if recipe.selection["on"] == "validation" else test_sets
        return select_checkpoints(recipe, folder, runs, sets)
    last: dict[str, str] = {}
    for run, path in candidate_checkpoints(recipe, folder, runs):
        if run.name not in last or step_of(path.name) > step_of(last[run.name]):
            last[run.name] = path.name
    return last


def select_checkpoints(
    recipe: Recipe, folder: RunFolder, runs: Sequence[TrainedRun], sets: Sequence[TestSet]
) -> dict[str, str]:
    """The best candidate of every run by its mean score over `sets`; of equal ones the earlier. Kept in a file.

    Returns:
        The checkpoint's name by the run's name; `selection.json` has every candidate's score beside it.

    Raises:
        UserError: a decode file is missing, or does not fit its references.
    """
    from convexlm.scoring import Scorer, get_metric
    from convexlm.segments import read_hypotheses

    metric, search = recipe.selection["metric"], recipe.selection["search"]
    files = {
        (run.name, path.name): [folder.decode(run, path.name, one.name, one.pair, search) for one in sets]
        for run, path in candidate_checkpoints(recipe, folder, runs)
    }
    if missing := [path for paths in files.values() for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file; it is needed to select a checkpoint")
    inputs = json_sha256(
        [
            SCHEMA,
            recipe.selection,
            [[*key, [file_sha256(path) for path in paths]] for key, paths in files.items()],
            [[one.name, one.pair, [text_sha256(stream) for stream in one.references]] for one in sets],
        ]
    )
    known = _read_selection(folder)
    if known.get("inputs") == inputs:
        return dict(known["chosen"])
    scorers = [Scorer(one.references, one.pair.split("-")[1], [metric]) for one in sets]
    scores: dict[str, dict[str, float]] = {}
    for (run, checkpoint), paths in files.items():
        found = [
            scorer.score(read_hypotheses(path), label=str(path))[0].score
            for scorer, path in zip(scorers, paths, strict=True)
        ]
        scores.setdefault(run, {})[checkpoint] = sum(found) / len(found)
    sign = 1 if get_metric(metric).higher_is_better else -1
    chosen = {run: max(found, key=lambda name: (sign * found[name], -step_of(name))) for run, found in scores.items()}
    record = {
        "schema": SCHEMA,
        "inputs": inputs,
        **recipe.selection,
        "sets": [{"name": one.name, "pair": one.pair, "num_sentences": len(one.sources)} for one in sets],
        "scores": scores,
        "chosen": chosen,
    }
    write_atomic(folder.selection, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    return chosen


def step_of(checkpoint: str) -> int:
    """The step in `checkpoint-STEP`."""
    return int(checkpoint.rsplit("-", 1)[1])


def read_instruction(recipe: Recipe) -> str | None:
    """The instruction that a recipe decodes with; None for the default.

    Raises:
        UserError: its file is missing or empty.
    """
    if path := recipe.decode.get("instruction_file"):
        return read_instruction_file(path, "decode.instruction_file")
    return recipe.decode.get("instruction")


def _read_selection(folder: RunFolder) -> dict[str, Any]:
    try:
        known = json.loads(folder.selection.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("chosen"), dict) else {}


def _decode(
    recipe: Recipe,
    folder: RunFolder,
    todo: Candidates,
    sets: Sequence[TestSet],
    options: Sequence[dict[str, Any]],
    title: str,
) -> None:
    from convexlm.decoding import CheckpointJobs, DecodeJob, Search, decode_sweep
    from convexlm.decoding.progress import progress_lines
    from convexlm.own_prompts import refuse_unknown_prompts
    from convexlm.tokenization import PromptSettings

    searches = [Search.from_mapping(one) for one in options]
    entries = []
    for run, checkpoint in todo:
        if not checkpoint.exists() and _is_decoded(folder, run, checkpoint.name, sets, searches):
            note(f"{title} {run.name} {checkpoint.name}: it was deleted; its finished files are taken as they are")
            continue
        refuse_unknown_prompts(checkpoint, "data.template")
        settings, instruction = PromptSettings.load(checkpoint), read_instruction(recipe)
        jobs = [
            DecodeJob(
                test_set=test_set,
                search=search,
                output_file=folder.decode(run, checkpoint.name, test_set.name, test_set.pair, search.name),
                settings=settings,
                instruction=instruction,
            )
            for test_set in sets
            for search in searches
        ]
        entries.append(CheckpointJobs(checkpoint, jobs, f"{run.name} {checkpoint.name}"))

    scores = LiveScores(sets, recipe.metrics[0])
    with progress_lines(title) as progress:

        def finished(number: int, results: list[Any]) -> None:
            said = ", ".join(filter(None, (_decoded(results), scores.said(results))))
            progress.say(f"{title} {entries[number].name} ({number + 1} of {len(entries)}): {said}")

        decode_sweep(
            entries,
            backend=recipe.decode.get("backend", "hf"),
            device=recipe.decode.get("device"),
            dtype=recipe.decode.get("dtype"),
            batch_size=recipe.decode.get("batch_size"),
            token_budget=recipe.decode.get("token_budget"),
            compute_type=recipe.decode.get("compute_type"),
            gpu_memory_utilization=recipe.decode.get("gpu_memory_utilization"),
            num_processes=recipe.decode.get("num_processes") or 1,
            note=progress.say,
            progress=progress,
            finished=finished,
        )
    gc.collect()


def _is_decoded(
    folder: RunFolder, run: TrainedRun, checkpoint: str, sets: Sequence[TestSet], searches: Sequence[Any]
) -> bool:
    """Whether all files of a checkpoint that was deleted are there, of these sources and searches, as written.

    Raises:
        UserError: one is missing or another, and so the checkpoint is.
    """
    from convexlm.decoding.store import DecodeStore

    for test_set in sets:
        for search in searches:
            path = folder.decode(run, checkpoint, test_set.name, test_set.pair, search.name)
            known = {
                "test_set": test_set.name,
                "pair": test_set.pair,
                "sources_sha256": text_sha256(test_set.sources),
                "search": search.settings(),
            }
            if DecodeStore(path, known, test_set.ids).finished() is None:
                raise UserError(
                    f"{folder.train(run) / checkpoint}: no such folder, and {path} is still to be decoded from it; "
                    f"put it back, or delete {folder.train(run)} to train {run.name} again"
                )
    return True


def _decoded(results: list[Any]) -> str:
    fresh = sum(result.num_sentences - result.resumed for result in results)
    if not fresh:
        return "done"
    cut = sum(result.cut for result in results)
    return f"{fresh} sentences" + (f", {cut} cut at max_new_tokens" if cut else "")


def _name(options: dict[str, Any]) -> str:
    from convexlm.decoding import Search

    return Search.from_mapping(options).name


def _say_chosen(recipe: Recipe, chosen: dict[str, str]) -> None:
    on, metric, search = (recipe.selection[key] for key in ("on", "metric", "search"))
    said = ", ".join(f"{run} {checkpoint}" for run, checkpoint in chosen.items())
    note(f"[3/5] selected on {on} ({metric}, {search}): {said}")
