"""The decode file: every sentence exactly once, whatever kills the process and whenever.

While a job runs, its results are appended to `X.jsonl.part`: a header line with the job's identity, then one line a
sentence in the order they were done, flushed to disk batch by batch (and a line that names sentences which were put
off, to be decoded in a later round). When all are there, `X.jsonl` is written whole in
source order, then `X.meta.json`, and only then is the part file removed, so at any moment either the part file or the
pair of finished files holds everything that was done. The part file is also the lock: a process works on it only while
it holds it exclusively.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_jsonl, sync_folder, text_sha256, to_json_line, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

_SCHEMA = 1
_HEADER = b'{"convexlm_decode": '


class DecodeStore:
    """The files of one decoding job. As a context manager it holds the lock and the part file.

    Args:
        output_file: the finished file, `X.jsonl`.
        identity: what makes this job the same as another: hashes and settings, JSON-ready.
        ids: the sentences' ids in source order, each once.

    Attributes:
        records: what is done, by id.
        put_off: ids of the sentences that each round put off to the next one, done since or not.
        seconds: of decoding what is done, summed over processes and over runs; None if an earlier version did some.
    """

    def __init__(self, output_file: Path, identity: dict[str, Any], ids: Sequence[str]) -> None:
        if len(set(ids)) != len(ids):
            raise ValueError("sentence ids must be unique")
        self.output_file = output_file
        self.identity = identity
        self.ids = list(ids)
        self.records: dict[str, dict[str, Any]] = {}
        self.put_off: dict[int, set[str]] = {}
        self.seconds: float | None = 0.0
        self.part_file = output_file.with_name(output_file.name + ".part")
        self.meta_file = meta_path(output_file)
        self._handle = -1
        self._ours = False

    def finished(self) -> dict[str, Any] | None:
        """The meta record if this very job is complete, None if it is still to do.

        Raises:
            UserError: the output is another job's, or not a decode file, or was changed since.
        """
        if self.output_file.is_dir():
            raise UserError(f"{self.output_file}: is a folder, expected a file to write")
        if not self.output_file.exists():
            self._refuse_foreign_meta()
            return None
        if not self.meta_file.exists():
            if self.part_file.exists():  # stopped between the two; the part file says whose it is
                return None
            raise UserError(
                f"{self.output_file}: exists, without the {self.meta_file.name} that a decode file has beside it; "
                "nothing was overwritten: give another output file or remove this one"
            )
        try:
            meta = json.loads(self.meta_file.read_text(encoding="utf-8"))
            identity = {key: meta.get(key) for key in self.identity}
            written = meta["hypotheses_sha256"]
        except (OSError, ValueError, KeyError, AttributeError):
            raise UserError(
                f"{self.meta_file}: damaged; remove it and {self.output_file.name} to decode again"
            ) from None
        self._refuse_other(self.output_file, identity)
        hypotheses = [str(record.get("hypothesis")) for record in read_jsonl(self.output_file)]
        if text_sha256(hypotheses) != written:
            raise UserError(
                f"{self.output_file}: was changed after it was written; nothing was overwritten: give another output "
                "file or remove this one"
            )
        return meta

    def __enter__(self) -> DecodeStore:
        """Take the lock and read back what is done.

        Raises:
            UserError: another process is at it, the part file is another job's or damaged, or it cannot be written.
        """
        try:
            self.output_file.parent.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise UserError(f"{self.part_file}: cannot be written ({error.strerror or error})") from None
        try:
            self._remove_stale()
            self._read_back()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the lock; the part file stays for the next run."""
        self.close()

    def close(self) -> None:
        """Let go of the lock, and remove a part file with nothing in it."""
        if self._handle >= 0:
            if self._ours and not self.records and not any(self.put_off.values()):
                self.remove_part()
            os.close(self._handle)
            self._handle = -1

    def append(
        self, records: Iterable[dict[str, Any]], put_off: Iterable[str] = (), round: int = 0, seconds: float = 0.0
    ) -> None:
        """Add finished sentences, and ids of those that `round` puts off, and wait until they are on the disk.

        Args:
            records: the sentences.
            put_off: the ids.
            round: whose.
            seconds: what both took.

        Raises:
            UserError: the disk is full or fails; what was added before is safe.
        """
        new = {record["id"]: record for record in records if record["id"] not in self.records}
        later = sorted(set(put_off) - self.put_off.get(round, set()))
        notes = [{"put_off": later, "round": round}] if later else []
        if new or notes:
            # Before what they were spent on, of which a kill may tear off the end.
            spent = [{"seconds": seconds}] if seconds else []
            self._write("".join(map(to_json_line, [*spent, *new.values(), *notes])))
            if self.seconds is not None:
                self.seconds += seconds
        self.records.update(new)
        self.put_off.setdefault(round, set()).update(later)

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the finished file and its meta record, then remove the part file.

        Args:
            facts: what the meta record has beside the identity.

        Returns:
            The meta record.

        Raises:
            UserError: the disk is full or fails; every sentence is still in the part file.
        """
        rows = [self.records[id_] for id_ in self.ids]
        digest = text_sha256(row["hypothesis"] for row in rows)
        meta = {"schema": _SCHEMA, **self.identity, **facts, "hypotheses_sha256": digest}
        try:
            write_atomic(self.output_file, "".join(map(to_json_line, rows)))
            write_atomic(self.meta_file, json.dumps(meta, indent=2, ensure_ascii=True) + "\n")
        except OSError as error:
            raise self._no_room(error) from None
        self.remove_part()
        return meta

    def discard_leftover(self) -> None:
        """Remove the part file of a finished job, as a kill in the last moment leaves it; not another process's."""
        if self.part_file.exists():
            with contextlib.suppress(UserError), self:
                self.remove_part()

    def remove_part(self) -> None:
        """Remove the part file, while holding it, of a job whose finished files are there."""
        self._ours = False  # from here on, whatever stands there is another's
        self.part_file.unlink(missing_ok=True)
        sync_folder(self.part_file.parent)

    def _lock(self) -> None:
        while True:
            handle = os.open(self.part_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise UserError(f"{self.output_file}: another process is decoding into it right now") from None
            # Between opening and locking, the process that held it may have finished and removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self.part_file)):
                    self._handle = handle
                    return
            os.close(handle)

    def _read_back(self) -> None:
        raw = self.part_file.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]  # a torn last line is cut
        self.records, self.put_off, self.seconds = {}, {}, 0.0
        if not whole:
            if raw.strip(b"\0") and not raw.startswith(_HEADER[: len(raw)]):
                raise UserError(f"{self.part_file}: not a part of a decode file; remove it to start again")
            self._ours = True
            os.ftruncate(self._handle, 0)
            self._start()
            return
        header, *lines = whole.split(b"\n")[:-1]
        identity = self._parse(header, 1).get("identity")
        if not isinstance(identity, dict):
            raise UserError(f"{self.part_file}: not a part of a decode file (no header); remove it to start again")
        self._refuse_other(self.part_file, identity)
        self._ours = True
        known = set(self.ids)
        spent, untimed = [], False  # seconds stand before what they were spent on
        for number, line in enumerate(lines, start=2):
            record = self._parse(line, number)
            if known.issuperset(later := record.get("put_off", ())) and later:
                self.put_off.setdefault(record.get("round", 0), set()).update(later)
                continue
            if record.keys() == {"seconds"}:
                spent.append(float(record["seconds"]))
                continue
            if record.get("id") not in known or "hypothesis" not in record:
                raise UserError(f"{self.part_file}, line {number}: not a sentence of this job; remove the file")
            self.records.setdefault(record["id"], record)
            untimed = untimed or not spent
        self.seconds = None if untimed else sum(spent)
        os.ftruncate(self._handle, len(whole))
        os.lseek(self._handle, 0, os.SEEK_END)

    def _remove_stale(self) -> None:
        """Remove what `write_atomic` leaves when it is killed; nobody else writes these files under the lock."""
        for path in (self.output_file, self.meta_file):
            for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                stale.unlink(missing_ok=True)

    def _start(self) -> None:
        if not self.output_file.exists():
            self.meta_file.unlink(missing_ok=True)  # of an output that was removed to have it made anew
        self._write(to_json_line({"convexlm_decode": _SCHEMA, "identity": self.identity}))
        sync_folder(self.part_file.parent)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:  # not UTF-8 or not JSON
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{self.part_file}, line {number}: damaged; remove the file to start again")
        return record

    def _refuse_foreign_meta(self) -> None:
        """Refuse a file in the meta record's place that is none; one whose output was removed is made anew."""
        if not self.meta_file.exists():
            return
        try:
            ours = "hypotheses_sha256" in json.loads(self.meta_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise UserError(
                f"{self.meta_file}: is not the meta record of a decode file, and {self.output_file.name} would have "
                "its own there; nothing was overwritten: give another output file or move this one"
            )

    def _refuse_other(self, path: Path, identity: dict[str, Any]) -> None:
        names = [key for key in {**self.identity, **identity} if self.identity.get(key) != identity.get(key)]
        if names:
            differences = [_difference(name, identity.get(name), self.identity.get(name)) for name in names]
            raise UserError(
                f"{path}: belongs to another job ({'; '.join(differences)}); nothing was overwritten: give another "
                "output file or remove this one"
            )

    def _write(self, text: str) -> None:
        data = memoryview(text.encode("utf-8"))
        end = os.lseek(self._handle, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next run cuts it
                os.ftruncate(self._handle, end)
            raise self._no_room(error) from None

    def _no_room(self, error: OSError) -> UserError:
        return UserError(
            f"{self.output_file}: cannot be written ({error.strerror or error}); {len(self.records)} of "
            f"{len(self.ids)} sentences are safe in {self.part_file.name}, and the same command goes on from there"
        )


def meta_path(output_file: Path) -> Path:
    """The meta record's place beside a decode file: `X.meta.json` for `X.jsonl`."""
    return output_file.with_name(output_file.name.removesuffix(".jsonl") + ".meta.json")


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        return "; ".join(_difference(f"{name} {key}", there.get(key), here.get(key)) for key in keys)
    if name.endswith("_sha256"):
        there, here = str(there)[:8], str(here)[:8]
    return f"{name}: {there} there, {here} now"
