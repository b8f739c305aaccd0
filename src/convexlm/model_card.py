"""The model card (README.md) of an exported checkpoint, in the hub's format.

Everything in it is picked by name: objective, data, chosen settings, scores. Paths of this machine become bare names,
and whatever looks like a token or key is left out, so nothing else of a run folder can slip in.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.card_objective import objective_lines, objective_of
from convexlm.card_text import cell, code, plain
from convexlm.checkpoints import read_marker, step_of
from convexlm.dataset_names import dataset_path, parse_dataset
from convexlm.errors import UserError
from convexlm.files import read_jsonl, write_atomic
from convexlm.options import load_yaml
from convexlm.own_prompts import KEY as OWN_PROMPTS
from convexlm.quantized import bits_trained_on
from convexlm.redaction import clean
from convexlm.report.text import is_number, metric_title, score_text, visible
from convexlm.runs import VERSIONED, versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CARD_FILE = "README.md"
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "num_train_epochs"),
    *("max_steps", "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *(
        "packing",
        "bf16",
        "fp16",
        "optim",
        "k_warmup",
        "label_smoothing_factor",
        "neftune_noise_alpha",
        "max_grad_norm",
    ),
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora"),
    *("load_in_4bit", "load_in_8bit", "dtype", "model_revision", "seed"),
)
_LOCAL = re.compile(r"^(/|~|\.{1,2}(/|$)|[A-Za-z]:[\\/]|\\\\|file:)")
_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+|[\w-]+")


def write_card(
    folder: Path,
    *,
    checkpoint: Path,
    run_dir: str | Path | None,
    kind: str,
    parameters: int,
    dtype: str,
    base_model: str | None,
    license_name: str | None,
    name: str,
) -> dict[str, Any]:
    """Write the card of an exported folder.

    Args:
        folder: where the model lies.
        checkpoint: what it was made of.
        run_dir: the run folder; found by the checkpoint's path if None.
        kind: as `export_checkpoint` says.
        parameters: how many there are.
        dtype: what they are.
        base_model: what the user names as the base.
        license_name: what the user names as the licence.
        name: the model's name.

    Returns:
        `scores`: how many are shown.

    Raises:
        UserError: `run_dir` is no run folder, or its files are damaged.
    """
    from huggingface_hub import ModelCardData

    checkpoint = _place(checkpoint)
    run = find_run(checkpoint, run_dir)
    recipe = load_yaml(run / "recipe.yaml") if run else {}
    arm = _arm_of(checkpoint, recipe)
    if run_dir is not None:
        _refuse_another_run(checkpoint, arm, recipe, run_dir)
    # A checkpoint says itself how it was trained, where no recipe does.
    trained = _told_by(read_marker(checkpoint))
    settings = {**_mapping(recipe, "model"), **_mapping(recipe, "train"), **_arm(arm, recipe)} if run else trained
    before = _arms_before(arm, recipe)
    marker = read_marker(folder)
    objective = _mapping(marker, "objective") or objective_of(settings)
    base = public_name(base_model or settings.get("model_name_or_path") or _named_base(checkpoint))
    dataset = public_name(settings.get("dataset") or _mapping(recipe, "data").get("dataset"))
    known = parse_dataset(dataset).name if dataset else None  # the card's field takes neither config nor split
    scores = _scores(run, checkpoint, arm) if run else []
    kept: dict[str, Any] = {
        "base_model": base if base and _HUB.fullmatch(base) and "/" in base else None,
        "datasets": [known] if known and _HUB.fullmatch(known) and "/" in known else None,
        "license": clean(license_name) if license_name else None,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["convexlm", "sft", "trl", *([str(objective["name"])] if "name" in objective else [])],
        "metrics": sorted({str(row["metric"]).split("-")[0] for row in scores}) or None,
        "language": sorted({code for row in scores for code in str(row["pair"]).split("-")}) or None,
        "model_name": visible(clean(name)),
    }
    data = ModelCardData(
        **{key: value for key, value in kept.items() if value is not None}, eval_results=_results(scores) or None
    )
    body = "\n".join(
        [
            f"# {plain(name)}",
            "",
            _opening(kind, base, objective, parameters, dtype, checkpoint, recipe, before),
            "",
            *objective_lines(objective, {**trained, **settings}),
            *_prompt_section(_mapping(marker, "prompt"), own=marker.get(OWN_PROMPTS) is True),
            *_data_section(dataset, _mapping(recipe, "data").get("max_records", settings.get("max_records"))),
            *_settings_section(settings, recipe, checkpoint),
            *_before_section(before, recipe),
            *_scores_section(scores),
            "## Versions",
            "",
            ", ".join(f"{key} {value}" for key, value in _versions(recipe).items()),
        ]
    )
    write_atomic(folder / CARD_FILE, f"---\n{data.to_yaml()}\n---\n\n{visible(body)}\n")
    return {"scores": len(scores)}


def public_name(value: Any) -> str | None:
    """A model's or dataset's name for others to read: a hub name as it is, of a path of this machine its last part."""
    if isinstance(value, dict):
        return clean(value.get("kind", "generated"))
    if not value:
        return None
    raw = str(value)
    if "://" in raw:  # an address may hold a host or a password that is nobody's business
        return clean(raw.split("?")[0].rstrip("/").rsplit("/", 1)[-1])
    text = clean(raw)
    local = bool(_LOCAL.match(text)) or dataset_path(text).exists() or text.count("/") > 1
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if local else text


def find_run(checkpoint: Path, run_dir: str | Path | None) -> Path | None:
    """The run folder of a checkpoint `RUN_DIR/train/RUN/checkpoint-STEP` (absolute), or the one that is named.

    Raises:
        UserError: a folder is named that is no run folder.
    """
    if run_dir is not None:
        if not (Path(run_dir) / "recipe.yaml").is_file():
            raise UserError(f"--run_dir {run_dir}: no run folder (recipe.yaml is missing)")
        return Path(run_dir)
    parents = checkpoint.parents
    found = len(parents) > 2 and parents[1].name == "train" and (parents[2] / "recipe.yaml").is_file()
    return parents[2] if found else None


def _place(checkpoint: Path) -> Path:
    """Where a checkpoint lies, absolute: its name and its folders' say what it is.

    A link into a run folder stands for what it leads to, a link that lies in one for itself; `.` for where it is.
    """
    here, real = Path(os.path.abspath(checkpoint)), checkpoint.resolve()
    called = find_run(here, None) or (here.name.startswith("checkpoint-") and not find_run(real, None))
    return here if called else real


def _arm_of(checkpoint: Path, recipe: Mapping[str, Any]) -> str:
    run = checkpoint.parent.name
    arms = _mapping(recipe, "arms")
    return run if run in arms else re.sub(r"\.seed\d+$", "", run)


def _refuse_another_run(checkpoint: Path, arm: str, recipe: Mapping[str, Any], run_dir: str | Path) -> None:
    """See that a run folder that was named has the run of this checkpoint, whose folder says which one it is.

    Raises:
        UserError: it has no such run, or several.
    """
    arms, run = list(_mapping(recipe, "arms")), checkpoint.parent.name
    given = recipe.get("seeds")
    seeds = [str(seed) for seed in given] if isinstance(given, list) and len(given) > 1 else []
    if (arms and arm not in arms) or (seeds and _seed_of(checkpoint, recipe) not in seeds):
        example = (arms or ["ARM"])[0] + (f".seed{seeds[0]}" if seeds else "")
        raise UserError(
            f"--run_dir {run_dir}: which of its runs the checkpoint is from cannot be told; its folder (`{run}`) must "
            f"be called as the run is, such as {example}"
        )


def _told_by(marker: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint's marker holds, without those that are off; model and data by their names."""
    told = {**_mapping(marker, "optimizer"), **_mapping(marker, "training")}
    told["global_batch_size"] = told.get("global_batch")
    model, _, _ = str(_mapping(told, "model").get("name") or "").partition("@")  # the revision
    named = {"model_name_or_path": model, "dataset": _mapping(told, "dataset").get("name")}
    named["max_records"] = told.get("max_records")
    return {key: value for key, value in {**{key: told.get(key) for key in SETTINGS}, **named}.items() if value}


def _arm(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    return _mapping(_mapping(recipe, "arms"), name)


def _arms_before(arm: str, recipe: Mapping[str, Any]) -> list[str]:
    """The arms that were trained before this one, whose ends it began from; the first one first."""
    found: list[str] = []
    while (start := _arm(found[0] if found else arm, recipe).get("init_from")) and str(start) not in found:
        found.insert(0, str(start))
    return found


def _objective_name(arm: str, recipe: Mapping[str, Any]) -> str:
    return objective_of({"objective": "convex", **_mapping(recipe, "train"), **_arm(arm, recipe)})["name"]


def _seed_of(checkpoint: Path, recipe: Mapping[str, Any]) -> str | None:
    """The seed that a checkpoint of a run was trained with; None where nothing says it."""
    if found := re.search(r"\.seed(\d+)$", checkpoint.parent.name):
        return found[1]
    seeds = recipe.get("seeds")
    first = seeds[0] if isinstance(seeds, list) and len(seeds) == 1 else recipe.get("plain_seed")
    return None if first is None else str(first)


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return dict(found) if isinstance(found, dict) else {}


def _named_base(checkpoint: Path) -> str | None:
    path = checkpoint / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return None


# -- scores


def _scores(run: Path, checkpoint: Path, arm: str) -> list[dict[str, Any]]:
    path = run / "scores.jsonl"
    if not path.is_file():
        return []
    seed = _seed_of(checkpoint, load_yaml(run / "recipe.yaml"))
    needed = ("arm", "checkpoint", "test_set", "pair", "search", "metric", "score")
    return [
        row
        for row in read_jsonl(path, torn_last_line_ok=True)
        if all(key in row for key in needed)
        and row["arm"] == arm
        and row.get("role") != "validation"
        and str(row["checkpoint"]) in (checkpoint.name, checkpoint.name.removeprefix("checkpoint-"))
        and (seed is None or str(row.get("seed")) == seed)
        and is_number(row["score"])
    ]


def _results(scores: Iterable[Mapping[str, Any]]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="summarization" if len(set(str(row["pair"]).split("-"))) == 1 else "translation",
            dataset_type=clean(row["test_set"]),
            dataset_name=f"{clean(row['test_set'])} {clean(row['pair'])}",
            dataset_config=clean(row["pair"]),
            metric_type=str(row["metric"]),
            metric_name=f"{metric_title(str(row['metric']))} ({clean(row['search'])})",
            metric_value=round(float(row["score"]), 4),
        )
        for row in scores
    ]


def _scores_section(scores: list[dict[str, Any]]) -> list[str]:
    if not scores:
        return ["## Scores", "", "None were at hand when this card was written.", ""]
    lines = ["## Scores", "", "| test set | pair | search | metric | score | signature |", "|---|---|---|---|--:|---|"]
    for row in scores:
        cells = [row["test_set"], row["pair"], row["search"], metric_title(str(row["metric"]))]
        shown = [_cell(cell) for cell in cells] + [
            score_text(row["score"], str(row["metric"])),
            cell(code(row.get("signature", ""))),
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return [*lines, ""]


def _cell(text: Any) -> str:
    return cell(plain(text))


# -- words


def _opening(
    kind: str,
    base: str | None,
    objective: Mapping[str, Any],
    parameters: int,
    dtype: str,
    checkpoint: Path,
    recipe: Mapping[str, Any],
    before: list[str],
) -> str:
    model = _mapping(recipe, "model")
    new = bool(model.get("config") or model.get("config_name"))
    what = {"adapter": "An adapter (LoRA)", "merged": "A causal language model, its adapter merged into it,"}
    start = f" fine-tuned of {code(base)}" if base else " trained from random weights" if new else " fine-tuned"
    name = objective.get("name")
    first = [f"with the {code(_objective_name(earlier, recipe))} objective" for earlier in before]
    if first:
        first[0] = "first " + first[0]
    last = f"with the {code(name)} objective" if name else ""
    how = start + (" " if last or first else "") + ", then ".join(filter(None, [*first, last]))
    step = step_of(checkpoint)
    of_last = " of the last training" if before else ""
    at = f", at step {step:,}{of_last}" if checkpoint.name.startswith("checkpoint-") and step >= 0 else ""
    opening = (
        f"{what.get(kind, 'A causal language model')}{how} by convexlm{at}: {parameters:,} parameters in {dtype}."
    )
    bits = bits_trained_on(checkpoint)
    own = " This is that base's own weights with the adapter added." if kind == "merged" else ""
    return opening + (f" The adapter was trained on the base's weights in {bits} bits.{own}" if bits else "")


def _prompt_section(prompt: Mapping[str, Any], *, own: bool) -> list[str]:
    if not prompt:
        return []
    bos = "with" if prompt.get("add_bos") else "without"
    if own:
        text = f"Trained on whole prompts as the data have them, {bos} a BOS token before each; `convexlm decode` "
        return ["## Prompts", "", f"{text}needs `--template`, which says what makes one of a source.", ""]
    return [
        "## Prompts",
        "",
        f"Trained on the prompt template {code(prompt.get('template'))}, {bos} a BOS token before it; `convexlm "
        "decode` reads this from `convexlm.json`.",
        "",
    ]


def _data_section(dataset: str | None, most: Any) -> list[str]:
    if not dataset:
        return []
    limit = f", its first {most:,} records" if isinstance(most, int) else ""
    return ["## Data", "", f"{code(dataset)}{limit}.", ""]


def _settings_section(settings: Mapping[str, Any], recipe: Mapping[str, Any], checkpoint: Path) -> list[str]:
    shown = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    if seed := _seed_of(checkpoint, recipe):
        shown["seed"] = seed
    state = checkpoint / "trainer_state.json"
    if state.is_file():
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            shown["epochs trained"] = round(float(content["epoch"]), 3)
            shown["steps trained"] = int(content["global_step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            pass
    if not shown:
        return []
    rows = [f"| {key} | {_cell(value)} |" for key, value in shown.items()]
    return ["## Settings", "", "| setting | value |", "|---|---|", *rows, ""]


def _before_section(before: list[str], recipe: Mapping[str, Any]) -> list[str]:
    """What was trained before, in its order: objective and settings of each arm."""
    lines = []
    for arm in before:
        settings = {**_mapping(recipe, "model"), **_mapping(recipe, "train"), **_arm(arm, recipe)}
        objective = objective_of({"objective": "convex", **settings})
        dataset = public_name(settings.get("dataset") or _mapping(recipe, "data").get("dataset"))
        shown = {**{key: value for key, value in objective.items() if key != "name"}, "dataset": dataset}
        shown.update({key: settings[key] for key in SETTINGS if settings.get(key) is not None})
        told = ", ".join(f"{key} = {plain(value)}" for key, value in shown.items() if value is not None)
        lines.append(f"- {code(arm)}, with the {code(objective['name'])} objective: {told}.")
    return ["## Trained before", "", *lines, ""] if lines else []


def _versions(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Of the training, where the run folder says; else of this export."""
    noted = _mapping(recipe, "versions")
    return {key: clean(noted[key]) for key in VERSIONED if key in noted} or versions()
