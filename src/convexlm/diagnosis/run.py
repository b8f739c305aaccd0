"""A whole diagnosis: data and checkpoint to a JSON-ready result, with measurements from the cache where they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from convexlm.diagnosis.advice import advise, as_dicts
from convexlm.diagnosis.analyse import Sample, analyse, compare, record_weights
from convexlm.diagnosis.cache import cache_path, load, store
from convexlm.diagnosis.measure import Measurement, measure
from convexlm.diagnosis.sample import RecordSample, sample_records
from convexlm.errors import UserError
from convexlm.positions import positions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from convexlm.objectives import Objective
    from convexlm.tokenization import PromptSettings, TokenizedRecords

SHOWN_PROMPT, SHOWN_COMPLETION = 200, 400
SCHEMA = 1


@dataclass(frozen=True)
class DiagnoseOptions:
    """What to measure and how; names and meanings are those of `convexlm diagnose`."""

    dataset: str
    template: str | None = None
    max_records: int | None = 2000
    seed: int = 0
    max_length: int | None = None
    source_field: str | None = None
    judged_field: str | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    use_cache: bool = True


def diagnose(
    checkpoint: Path,
    objectives: Sequence[tuple[str, Objective]],
    options: DiagnoseOptions,
    *,
    compare_with: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Measure a sample of the data with a checkpoint, and say what every objective would do with it.

    Args:
        checkpoint: a checkpoint or adapter folder that `find_checkpoint` gave.
        objectives: labels and objectives.
        options: the rest.
        compare_with: another checkpoint, measured on the same records.
        note: is told what the user should know while it happens.
        progress: as in `measure`.

    Returns:
        JSON-ready; `measured` has every record (see `measured_records`), which the verb writes to a file of its own.

    Raises:
        UserError: data, checkpoint, objectives or options cannot be used, or the two checkpoints do not take the same
            token ids.
    """
    from convexlm.decoding.checkpoint import choose_device
    from convexlm.decoding.loading import load_tokenizer
    from convexlm.tokenization import answer_end

    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {options.batch_size}")
    checkpoints = [checkpoint] if compare_with is None else [checkpoint, compare_with]
    device = choose_device(options.device)
    settings = _prompt_settings(checkpoints, options.template, note)
    sample = sample_records(
        options.dataset,
        template=settings.template,
        max_records=options.max_records,
        seed=options.seed,
        source_field=options.source_field,
        judged_field=options.judged_field,
    )
    limit = _max_length(checkpoints, options, note)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=options.trust_remote_code)
    tokenized = _tokenize(sample, tokenizer, settings, limit)
    if not any(row["weight"] > 0 for row in tokenized.rows):
        raise UserError(f"{options.dataset}: every record of the sample has the weight 0")
    lost = len(tokenized.dropped) + tokenized.truncated
    if lost:
        note(f"{len(tokenized.dropped)} records dropped and {tokenized.truncated} cut at max_length {limit}")
    if compare_with is not None:
        other = load_tokenizer(compare_with, trust_remote_code=options.trust_remote_code)
        if _tokenize(sample, other, settings, limit).rows != tokenized.rows:
            raise UserError(
                f"{compare_with}: its tokenizer gives other token ids than {checkpoint}'s; p̄ and NLL a token cannot "
                f"be "
                "compared between the two"
            )
    end = answer_end(tokenizer, settings)
    measured = [_measured(folder, tokenized, end, device, options, note, progress) for folder in checkpoints]
    samples = [_as_sample(one, tokenized, sample) for one, _ in measured]
    try:
        analysis = analyse(samples[0], objectives)
    except ValueError as error:  # of an objective of the user's own
        raise UserError(str(error)) from None
    result = {
        "schema": SCHEMA,
        "model": str(checkpoint),
        "dataset": str(options.dataset),
        "prompt": {"template": settings.template, "add_bos": settings.resolve(tokenizer).add_bos},
        "reading": {
            "total_records": sample.total,
            "sampled": len(sample.records),
            "seed": options.seed,
            "dropped": len(tokenized.dropped),
            "truncated": tokenized.truncated,
            "lost_share": lost / len(sample.records),
            "max_length": limit,
            "source_field": sample.source_field,
            "judged_field": options.judged_field,
        },
        "device": device,
        "dtype": measured[0][1]["dtype"],
        "cached": [about["cached"] for _, about in measured],
        "end_p": _geometric_mean(measured[0][0].end_log_probs),
        **analysis,
    }
    if options.judged_field is not None and result["data"]["judged"] is None:
        note(
            f"--judged_field {options.judged_field}: no right or no wrong record is left after those dropped or of "
            "weight 0, so nothing is said of them"
        )
    result["comparison"] = compare_with and {"checkpoint": str(compare_with), **compare(*samples)}
    result["advice"] = as_dicts(advise(result))
    result["records"] = _shown_records(result, tokenized, sample)
    result["measured"] = measured_records(samples[0], tokenized, objectives)
    return result


def measured_records(
    sample: Sample, tokenized: TokenizedRecords, objectives: Sequence[tuple[str, Objective]]
) -> list[dict[str, Any]]:
    """Each measured record in the data's order: `id`, `tokens`, `log_prob` (m, nats a token), `p_bar`, `weights`.

    `weights` has every objective's weight by its label, at token level the mean over the record's tokens.
    """
    weights = {label: record_weights(sample, objective)[0] for label, objective in objectives}
    return [
        {
            "id": row["record_id"],
            "tokens": int(sample.lengths[place]),
            "log_prob": float(sample.m[place]),
            "p_bar": float(np.exp(sample.m[place])),
            "weights": {label: float(values[place]) for label, values in weights.items()},
        }
        for place, row in enumerate(tokenized.rows)
    ]


def _prompt_settings(checkpoints: Sequence[Path], template: str | None, note: Callable[[str], None]) -> PromptSettings:
    """How prompts are made: as the checkpoint was trained, else as the one it is compared with, else as Alpaca's."""
    from convexlm.decoding.checkpoint import has_prompt_settings
    from convexlm.templates import get_template
    from convexlm.tokenization import PromptSettings

    known = {folder: PromptSettings.load(folder) for folder in checkpoints if has_prompt_settings(folder)}
    found = list(dict.fromkeys(known.values()))
    if template is not None:
        get_template(template)
        return replace(found[0] if found else PromptSettings(), template=template)
    if len(found) > 1:
        first, second = checkpoints
        raise UserError(
            f"{first} and {second} were trained with other prompts ({found[0].template} and {found[1].template}); "
            "choose one with --template"
        )
    if found:
        folder = next(iter(known))
        if folder != checkpoints[0]:
            note(f"prompts are made as {folder} was trained: template `{found[0].template}`")
        return found[0]
    note(
        f"{checkpoints[0]} does not say how its prompts were made (no convexlm.json): using the template "
        f"`{PromptSettings.template}`; --template NAME chooses another"
    )
    return PromptSettings()


def _max_length(checkpoints: Sequence[Path], options: DiagnoseOptions, note: Callable[[str], None]) -> int | None:
    """The longest row: as asked for, but never more than the models have positions, the one with the fewest too."""
    from convexlm.decoding.loading import load_config

    if options.max_length is not None and options.max_length < 2:
        raise UserError(f"--max_length must be at least 2, not {options.max_length}")
    limits: list[tuple[int, Path]] = []
    for folder in checkpoints:
        positions = positions_of(load_config(folder, trust_remote_code=options.trust_remote_code))
        if positions is not None:
            limits.append((positions, folder))
    if not limits:
        return options.max_length
    positions, folder = min(limits, key=lambda limit: limit[0])
    of = "the model" if folder == checkpoints[0] else str(folder)
    if options.max_length is not None and options.max_length > positions:
        note(f"--max_length {options.max_length} is more than {of}'s {positions} positions, which are taken")
    elif options.max_length is None and folder != checkpoints[0]:
        note(f"records are measured up to {of}'s {positions} positions, with both checkpoints")
    return min(positions, options.max_length or positions)


def _tokenize(sample: RecordSample, tokenizer: Any, settings: PromptSettings, limit: int | None) -> TokenizedRecords:
    from convexlm.tokenization import tokenize_records

    return tokenize_records(sample.records, tokenizer, settings, limit)


def _measured(
    checkpoint: Path,
    tokenized: TokenizedRecords,
    end: int,
    device: str,
    options: DiagnoseOptions,
    note: Callable[[str], None],
    progress: Callable[[int, int, float], None] | None,
) -> tuple[Measurement, dict[str, Any]]:
    from convexlm.decoding.checkpoint import checkpoint_sha256, choose_dtype

    dtype = choose_dtype(checkpoint, device, options.dtype)
    path = None
    if options.use_cache:
        path = cache_path(checkpoint_sha256(checkpoint), tokenized.rows, device=device, dtype=dtype)
        found = _from_cache(load(path), tokenized)
        if found is not None:
            note(f"{checkpoint}: measured before, taken from the cache ({path})")
            return found, {"dtype": dtype, "cached": True}
    import torch

    from convexlm.decoding.loading import load_model

    note(f"{checkpoint}: measuring {len(tokenized.rows)} records in {dtype} on {device}")
    model = load_model(checkpoint, device, getattr(torch, dtype), trust_remote_code=options.trust_remote_code)
    result = measure(
        model,
        tokenized.rows,
        eos_token_id=end,
        batch_size=options.batch_size,
        progress=progress,
        note=lambda text: note(f"{checkpoint}: {text}"),
    )
    del model
    if path is not None:
        try:
            store(path, result.arrays())
        except OSError as error:
            note(f"the measurement could not be kept in {path.parent} ({error.strerror or error})")
    return result, {"dtype": dtype, "cached": False}


def _from_cache(arrays: dict[str, np.ndarray] | None, tokenized: TokenizedRecords) -> Measurement | None:
    """The kept measurement if it is of these rows; a damaged file is as good as none."""
    if arrays is None or set(arrays) != {"lengths", "log_probs", "logit_norms", "ends"}:
        return None
    lengths = [sum(label != -100 for label in row["labels"]) for row in tokenized.rows]
    whole = list(arrays["lengths"]) == lengths and len(arrays["ends"]) == len(lengths)
    whole = whole and len(arrays["log_probs"]) == len(arrays["logit_norms"]) == sum(lengths)
    return Measurement(**arrays) if whole and np.isfinite(arrays["log_probs"]).all() else None


def _as_sample(measured: Measurement, tokenized: TokenizedRecords, sample: RecordSample) -> Sample:
    sources = None
    if sample.sources is not None:
        by_id = dict(zip((record.id for record in sample.records), sample.sources, strict=True))
        sources = [by_id[row["record_id"]] for row in tokenized.rows]
    right = None
    if sample.judged is not None:
        judged = dict(zip((record.id for record in sample.records), sample.judged, strict=True))
        found = [judged[row["record_id"]] for row in tokenized.rows]
        right = np.array([np.nan if value is None else float(value) for value in found])
    return Sample(
        lengths=measured.lengths,
        m=measured.m,
        weights=np.array([row["weight"] for row in tokenized.rows], dtype=np.float64),
        sources=sources,
        log_probs=measured.log_probs,
        logit_norms=measured.logit_norms,
        right=right,
    )


def _geometric_mean(log_probs: np.ndarray) -> float | None:
    return float(np.exp(log_probs.mean())) if len(log_probs) else None


def _shown_records(result: dict[str, Any], tokenized: TokenizedRecords, sample: RecordSample) -> dict[str, Any]:
    """The text of every record that a list names, by its number in the sample; prompts keep their end."""
    wanted = {row["index"] for entry in result["objectives"] for row in (*entry["neglected"], *entry["favoured"])}
    by_id = {record.id: record for record in sample.records}
    shown = {}
    for index in sorted(wanted):
        record = by_id[tokenized.rows[index]["record_id"]]
        prompt, completion = record.prompt, record.completion
        shown[str(index)] = {
            "id": record.id,
            "prompt": prompt if len(prompt) <= SHOWN_PROMPT else "…" + prompt[-SHOWN_PROMPT:],
            "completion": completion if len(completion) <= SHOWN_COMPLETION else completion[:SHOWN_COMPLETION] + "…",
        }
    return shown
