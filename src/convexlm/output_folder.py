"""The folder that a training writes into: one training at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from typing import TYPE_CHECKING

from convexlm.checkpoints import all_checkpoints
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from convexlm.config import ConvexConfig

LOCK_FILE = ".training.lock"
METRICS = "metrics.jsonl"
SECONDS_TO_WAIT = 2.0  # for one that is just ending


def refuse_checkpoints(output_dir: Path, resume: bool) -> None:
    """Refuse an output folder that cannot be trained into.

    Raises:
        UserError: it or a folder above it is a file, or it holds checkpoints and `resume` is not given, or none and a
            model's weights, or a README.md or metrics.jsonl that no training wrote and a new one would write over.
    """
    for folder in (output_dir, *output_dir.parents):
        if folder.is_file():
            above = "" if folder == output_dir else f" ({folder})"
            raise UserError(f"--output_dir {output_dir}: is a file, not a folder{above}")
    if all_checkpoints(output_dir):
        if resume:
            return
        raise UserError(f"{output_dir} holds checkpoints already; give --resume to go on, or another --output_dir")
    if foreign := _foreign(output_dir):
        raise UserError(
            f"--output_dir {output_dir}: {foreign} is there and would be written over; choose another folder"
        )


def _foreign(output_dir: Path) -> str | None:
    """What is in a folder that a training would replace, and did not write: its name."""
    weights = next((file.name for file in output_dir.glob("*.safetensors")), None)
    if weights or (output_dir / "config.json").exists():
        return weights or "config.json"
    card, metrics = output_dir / "README.md", output_dir / METRICS
    with contextlib.suppress(OSError):
        # TRL's card and ours say so in the metadata at their head.
        if card.exists() and not re.match(
            rb"---\n.*?(convexlm|generated_from_trainer).*?\n---", card.read_bytes(), re.S
        ):
            return card.name
        if metrics.exists() and not _is_log(metrics):
            return metrics.name
    return None


def _is_log(path: Path) -> bool:
    """Whether a file holds what a training logs (`metrics_file.py`): numbers by step; an empty one may."""
    try:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may have torn the last line
        rows = [json.loads(line) for line in whole[:20] if line.strip()]
    except ValueError:
        return False
    return all(isinstance(row, dict) and type(row.get("step")) is int and len(row) > 2 for row in rows)


@contextlib.contextmanager
def held(args: ConvexConfig, output_dir: Path) -> Iterator[None]:
    """Hold an output folder for this training: the first of its processes does, and all of them hear of it.

    Raises:
        UserError: another training is at work there, or the folder cannot be made.
    """
    from accelerate.utils import broadcast_object_list

    handle, refusal, made = None, None, not output_dir.exists()
    if args.process_index == 0:
        try:
            handle = _lock(output_dir)
        except UserError as error:
            refusal = str(error)
    try:
        if args.world_size > 1:
            (refusal,) = broadcast_object_list([refusal])
        if refusal:
            raise UserError(refusal)
        yield
    finally:
        if handle is not None:
            _unlock(output_dir, handle, made)


def _lock(output_dir: Path) -> int:
    file, end = output_dir / LOCK_FILE, time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            # The folder may just have been removed by another that wrote nothing; in /proc none can ever be made.
            if isinstance(error, FileNotFoundError) and time.monotonic() < end:
                time.sleep(0.01)
                continue
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror or error})") from None
        try:
            # Of this process alone: the forked workers of a data loader do not keep it when their parent was killed.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            if time.monotonic() > end:
                raise UserError(
                    f"--output_dir {output_dir}: another training is at work here; wait for its end, or choose "
                    "another --output_dir"
                ) from None
            time.sleep(0.1)
            continue
        except OSError:  # some network file systems have no locks
            return handle
        # Between opening and locking, the process that held it may have ended and removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        os.close(handle)


def _unlock(output_dir: Path, handle: int, made: bool) -> None:
    """Remove the lock while still holding it, and a folder that was made for nothing."""
    with contextlib.suppress(OSError):
        (output_dir / LOCK_FILE).unlink(missing_ok=True)
        if made:
            output_dir.rmdir()
    os.close(handle)
