"""From which checkpoint a training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.checkpoints import (
    all_checkpoints,
    is_half_written_here,
    is_resumable,
    remove_checkpoint,
    step_of,
    why_incomplete,
)
from convexlm.errors import UserError
from convexlm.progress import note
from convexlm.training_marker import refuse_another_training

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from convexlm.config import ConvexConfig


def agreed_start(args: ConvexConfig, output_dir: Path, max_steps: int, marker: Mapping[str, Any]) -> Path | None:
    """Where to start, as the first of all processes finds it.

    Args:
        args: the training options.
        output_dir: where its checkpoints are.
        max_steps: how many steps it has in all.
        marker: what the checkpoints of this training have in their `convexlm.json`.

    Raises:
        UserError: another process does not see that folder, or as `refuse_another_training`.
    """
    from accelerate.utils import broadcast_object_list

    found = where_to_start(output_dir, max_steps) if args.process_index == 0 else None
    if args.world_size > 1:
        (found,) = broadcast_object_list([found])
        if found is not None and not found.is_dir():
            raise UserError(f"{found}: not on this machine; --output_dir has to be on a disk that all machines share")
    if found is not None:
        refuse_another_training(found, marker)
    return found


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
