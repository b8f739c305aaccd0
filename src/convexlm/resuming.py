"""From which checkpoint a training goes on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from convexlm.checkpoints import (
    all_checkpoints,
    is_half_written_here,
    is_resumable,
    read_marker,
    remove_checkpoint,
    step_of,
    why_incomplete,
)
from convexlm.errors import UserError
from convexlm.progress import note

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from convexlm.config import ConvexConfig


def refuse_checkpoints(output_dir: Path, resume: bool) -> None:
    """Refuse an output folder that cannot be trained into.

    Raises:
        UserError: it is a file, or holds checkpoints and `resume` is off.
    """
    if output_dir.is_file():
        raise UserError(f"--output_dir {output_dir}: is a file, not a folder")
    if all_checkpoints(output_dir) and not resume:
        raise UserError(f"{output_dir} holds checkpoints already; give --resume to go on, or another --output_dir")


def agreed_start(args: ConvexConfig, output_dir: Path, max_steps: int, marker: Mapping[str, Any]) -> Path | None:
    """Where to start, as the first of all processes finds it.

    Args:
        args: the training options.
        output_dir: where its checkpoints are.
        max_steps: how many steps it has in all.
        marker: what the checkpoints of this training have in their `convexlm.json`.

    Raises:
        UserError: another process does not see that folder, or the checkpoint is of another objective, of other
            prompts or of other data.
    """
    from accelerate.utils import broadcast_object_list

    found = where_to_start(output_dir, max_steps) if args.process_index == 0 else None
    if args.world_size > 1:
        (found,) = broadcast_object_list([found])
        if found is not None and not found.is_dir():
            raise UserError(f"{found}: not on this machine; --output_dir has to be on a disk that all machines share")
    if found is not None:
        _refuse_another_training(found, marker)
    return found


def training_marker(
    prompt: Mapping[str, Any], objective: Mapping[str, Any], args: ConvexConfig, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What checkpoints keep of what they are trained on and for.

    Args:
        prompt: the settings of prompts.
        objective: as `Objective.to_dict` gives it.
        args: the training options.
        data: what identifies the records: `dataset` (its `name` and `content`, None if not known), `max_records`.
    """
    options = {name: getattr(args, name) for name in ("k_warmup", "label_smoothing_factor", "max_length")}
    return {"prompt": dict(prompt), "objective": dict(objective), "training": {**options, **data}}


def _refuse_another_training(checkpoint: Path, marker: Mapping[str, Any]) -> None:
    """Refuse to go on with another objective, other prompts or other data; an older marker lacks some of them."""
    before = read_marker(checkpoint)
    for part in ("objective", "prompt", "training"):
        old: Any = before.get(part)
        new = json.loads(json.dumps(marker[part]))
        if not isinstance(old, dict):
            continue
        for key, value in new.items():
            if key not in old or (_same_data(old[key], value) if key == "dataset" else old[key] == value):
                continue
            what = {"name": "the objective", "dataset": "the data"}.get(key, key)
            then, now = (old[key]["name"], value["name"]) if key == "dataset" else (old[key], value)
            then, now = ("unset" if one is None else one for one in (then, now))
            if then == now:
                then, now = f"an earlier {then}", "as it is now"
            raise UserError(
                f"{checkpoint}: {what} was {then}, not {now}; --resume goes on with the options that a training was "
                "begun with: give those, or choose another --output_dir"
            )


def _same_data(old: Any, new: Any) -> bool:
    """Whether two datasets are the same as far as is known: by their content, else by their names."""
    if not isinstance(old, dict) or old.get("content") is None or new["content"] is None:
        return not isinstance(old, dict) or old.get("name") == new["name"]
    return bool(old["content"] == new["content"])


def where_to_start(output_dir: Path, max_steps: int) -> Path | None:
    """The last complete checkpoint from which training can go on; what is passed over is named.

    What a run was stopped while saving is deleted; what someone else left there stays until its step is saved again.
    """
    good = None
    for path in all_checkpoints(output_dir):
        reason = why_incomplete(path)
        if reason is None and not is_resumable(path) and step_of(path) < max_steps:
            reason = "has no optimizer state (save_only_model), so training cannot go on from it"
        if reason is None:
            good = path
        else:
            ours = is_half_written_here(path)
            note(f"  {path}: {reason}; {'removed' if ours else 'passed over'}")
            if ours:
                remove_checkpoint(path)
    return good
