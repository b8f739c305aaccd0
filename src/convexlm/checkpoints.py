"""Which checkpoints of a folder are whole, and the files that say so.

A checkpoint is begun with an empty file `.saving` in its folder. When everything is written and on the disk, an
inventory follows (`convexlm-files.json`: the sizes of the files without which training could not go on), and last of
all the marker, `convexlm.json`, with the prompt settings and the objective for decoding. What has no marker, or a file
of another size, is passed over.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.files import sync, sync_folder, write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

logger = logging.getLogger(__name__)

COMPLETE_FILE = "convexlm.json"
INVENTORY_FILE = "convexlm-files.json"  # no part of what a checkpoint answers, so not in the marker
SAVING_FILE = ".saving"
PROGRESS_FILE = "training_progress.json"
_NEEDED = (".safetensors", ".pt", ".pth", ".bin", ".distcp")
_NEEDED_NAMES = ("trainer_state.json", PROGRESS_FILE)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if it has none."""
    number = checkpoint.name.rsplit("-", 1)[-1]
    return int(number) if number.isdecimal() else -1


def all_checkpoints(output_dir: str | Path) -> list[Path]:
    """Every folder `checkpoint-STEP`, whole or not, by step."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def checkpoint_to_resume(given: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, in a user's own script, which has no markers.

    Args:
        given: a folder; True: the last one in `output_dir` that was written to the end; None or False: none.
        output_dir: of the training.

    Raises:
        ValueError: there is none, it was not written to the end, or it has no optimizer to go on with.
    """
    if not given:
        return None
    if given is True:
        found = all_checkpoints(output_dir)
        whole = [path for path in found if not _half_saved(path)]
        if not whole:
            raise ValueError(f"{output_dir}: there is no checkpoint to resume from that was written to the end")
        for path in found[found.index(whole[-1]) + 1 :]:
            logger.warning("%s is passed over: it was not written to the end", path)
        given = whole[-1]
    folder = Path(given)
    if _half_saved(folder):
        raise ValueError(f"{folder} was not written to the end (the run was stopped while saving); take one before it")
    if folder.is_dir() and not any(any(folder.glob(states)) for states in ("optimizer*", "global_step*")):
        raise ValueError(
            f"{folder} has no optimizer (`save_only_model`), whose state, and the schedule's place, would be lost; "
            "load it as the model of a new training instead"
        )
    return str(given)


def _half_saved(checkpoint: Path) -> bool:
    """Whether saving was stopped before its end. Where the marker stands already, all that came before it does too."""
    return (checkpoint / SAVING_FILE).exists() and not (checkpoint / COMPLETE_FILE).exists()


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a folder that were written to the end, by step."""
    return [path for path in all_checkpoints(output_dir) if why_incomplete(path) is None]


def why_incomplete(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, in words; None if it is whole."""
    if not (checkpoint / COMPLETE_FILE).is_file():
        return "not written to the end (the run was stopped while saving)"
    files = read_inventory(checkpoint).get("files", {})
    if not isinstance(files, dict):
        return f"{INVENTORY_FILE} is damaged"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's marker; empty if there is none that can be read."""
    return _read(checkpoint / COMPLETE_FILE)


def read_inventory(checkpoint: Path) -> dict[str, Any]:
    """`files` with their sizes in bytes, `resumable`, `interrupted`; empty for a checkpoint of an earlier version."""
    return _read(checkpoint / INVENTORY_FILE)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_resumable(checkpoint: Path) -> bool:
    """Whether optimizer and schedule are there, too (`save_only_model` leaves them out)."""
    return read_inventory(checkpoint).get("resumable", True) is not False


def is_interruption(checkpoint: Path) -> bool:
    """Whether it was saved for a signal, at a step where none was due."""
    return read_inventory(checkpoint).get("interrupted") is True


def best_checkpoint(checkpoint: Path, metric: str | None = None, greater: bool | None = None) -> str | None:
    """The best one that was known of when this one was saved; None if there is none, or it is gone.

    It lies beside this one: the Trainer keeps its path, which another working folder or a moved run makes wrong.

    Args:
        checkpoint: whose `trainer_state.json` says it.
        metric: `metric_for_best_model`; None: whatever it was then.
        greater: whether the greater is better.
    """
    state = _read(checkpoint / "trainer_state.json")
    if metric is None:
        best = state.get("best_model_checkpoint")
        path = checkpoint.parent / Path(best).name if isinstance(best, str) and best else None
    else:
        beside = [path for path in complete_checkpoints(checkpoint.parent) if not is_interruption(path)]
        step = best_step(state.get("log_history") or [], metric, greater, {step_of(path) for path in beside})
        path = next((path for path in beside if step_of(path) == step), None)
    return str(path) if path is not None and path.is_dir() else None


def planned_steps(checkpoint: Path) -> int | None:
    """How many steps the training was to have when a checkpoint of it was saved."""
    steps = _read(checkpoint / "trainer_state.json").get("max_steps")
    return steps if isinstance(steps, int) else None


def best_step(
    history: Iterable[Mapping[str, Any]], metric: str, greater: bool | None, steps: Collection[int] | None = None
) -> int | None:
    """The step at which an evaluation was best, the first of equal ones; None if nothing was measured.

    Args:
        history: `log_history` of the Trainer.
        metric: what is compared, with or without `eval_`.
        greater: whether the greater is better.
        steps: those that are compared; None: all.
    """
    key = f"eval_{metric.removeprefix('eval_')}"
    lines = [line for line in history if key in line and (steps is None or line["step"] in steps)]
    found = [(line[key] if greater else -line[key], -line["step"]) for line in lines if math.isfinite(line[key])]
    return -max(found)[1] if found else None


def begin_checkpoint(checkpoint: Path) -> None:
    """Make the folder, or empty it of what a run left there that was stopped while saving."""
    if checkpoint.exists():
        remove_checkpoint(checkpoint)
    checkpoint.mkdir(parents=True)
    (checkpoint / SAVING_FILE).touch()


def finish_checkpoint(
    checkpoint: Path, marker: Mapping[str, Any] | None, *, resumable: bool = True, interrupted: bool = False
) -> None:
    """Bring all of a checkpoint to the disk, then write inventory and marker (None: there is none to write).

    Args:
        checkpoint: the folder.
        marker: what its `convexlm.json` holds.
        resumable: whether the optimizer's state is there.
        interrupted: whether it was saved for a signal, at a step where none was due.
    """
    files = sync_tree(checkpoint)
    if marker is not None:
        sizes = {
            name: size
            for name, size in sorted(files.items())
            if (name.endswith(_NEEDED) and name != "training_args.bin") or Path(name).name in _NEEDED_NAMES
        }
        inventory = {"files": sizes, "resumable": resumable, "interrupted": interrupted}
        write_atomic(checkpoint / INVENTORY_FILE, json.dumps(inventory, indent=2) + "\n")
        write_atomic(checkpoint / COMPLETE_FILE, json.dumps(marker, indent=2, sort_keys=True) + "\n")
    (checkpoint / SAVING_FILE).unlink(missing_ok=True)
    sync_folder(checkpoint)
    sync_folder(checkpoint.parent)


def sync_tree(folder: Path) -> dict[str, int]:
    """Write all files under a folder through to the disk; their relative names and sizes in bytes."""
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            sync(path)
            sizes[str(path.relative_to(folder))] = path.stat().st_size
        sync_folder(Path(root))
    return sizes


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint so that, stopped half-way, it is none, and is known as ours to delete.

    Its marker becomes `.saving` first of all, and that goes last: without it what is left would be somebody else's.
    """
    if (checkpoint / COMPLETE_FILE).exists():
        (checkpoint / COMPLETE_FILE).replace(checkpoint / SAVING_FILE)
    else:
        (checkpoint / SAVING_FILE).touch()
    sync_folder(checkpoint)
    for path in sorted(checkpoint.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != SAVING_FILE:
            path.unlink(missing_ok=True)
    sync_folder(checkpoint)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, and what a signal saved before a newer one.

    Called when the newest is whole, so however it is stopped a complete checkpoint remains. The best one (by
    `metric_for_best_model`) stays. Incomplete ones are not counted and not touched.
    """
    complete = complete_checkpoints(output_dir)
    drop_interruptions(complete[:-1])
    regular = [path for path in complete[:-1] if path.exists()]
    if limit is None or limit <= 0:
        return
    spared = Path(best).name if best else None  # by its name, for its folder may have been moved
    surplus = len(regular) + 1 - limit
    for path in regular:
        if surplus <= 0:
            break
        if path.name != spared:
            remove_checkpoint(path)
            surplus -= 1


def drop_interruptions(checkpoints: list[Path]) -> None:
    """Delete those that were saved for a signal only: an undisturbed run would not have them."""
    for path in checkpoints:
        if is_interruption(path):
            remove_checkpoint(path)


def is_half_written_here(checkpoint: Path) -> bool:
    """Whether an incomplete checkpoint is what a run of this package left, and nothing of anyone else's."""
    return (checkpoint / SAVING_FILE).exists() or not any(checkpoint.iterdir())
