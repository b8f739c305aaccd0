"""Measurements kept on disk, so that asking again about the same model and data loads no model."""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from convexlm.decoding.ct2_cache import cache_folder
from convexlm.files import json_sha256, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCHEMA = 2  # of the files, and of how the numbers in them are computed


def cache_path(checkpoint_sha256: str, rows: Sequence[dict[str, Any]], *, device: str, dtype: str) -> Path:
    """Where the measurement of these rows by this checkpoint is kept.

    The key is made of what decides the numbers: the checkpoint's files, the token ids and labels (and so the data, its
    order, the sample, its seed, the template and the longest length), the kind of device and the dtype.
    """
    digest = hashlib.sha256()
    for row in rows:
        start = len(row["labels"]) - sum(label != -100 for label in row["labels"])
        digest.update(np.asarray([len(row["input_ids"]), start, *row["input_ids"]], dtype="<i8").tobytes())
    key = {
        "schema": SCHEMA,
        "checkpoint": checkpoint_sha256,
        "rows": digest.hexdigest(),
        "device": device.partition(":")[0],
        "dtype": dtype,
    }
    return cache_folder() / "diagnose" / f"{json_sha256(key)[:40]}.npz"


def store(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def load(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
