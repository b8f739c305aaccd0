"""Reading and writing files so that a result is there whole or not at all, and text is read as it is.

Every other module goes through these few functions, so the promises about atomic writes, torn last lines, BOMs and
line ends are kept in one place.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path` whole or not at all: beside it first, then fsync, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8", errors="surrogatepass") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        give_usual_permissions([Path(temporary)])  # mkstemp makes files that only their owner reads
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def give_usual_permissions(files: Iterable[Path]) -> None:
    """Give files the permissions that `open` would have made them with, where only their owner may read them.

    So does safetensors 0.8 leave what it writes (its issue 782): others of a group could not load a checkpoint.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the platform can."""
    sync(folder)


def sync(path: Path) -> None:
    """Write a file or folder through to the disk, where the platform can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_json_line(record: dict[str, Any]) -> str:
    r"""One JSON object on one line, ending in `\n`.

    Non-ASCII text stays readable, but for lone surrogates and the line separators that some readers split on
    (U+0085, U+2028, U+2029), which are escaped.
    """
    text = json.dumps(record, ensure_ascii=False)
    if any(mark in text for mark in "\x85\u2028\u2029") or not _encodable(text):
        text = json.dumps(record, ensure_ascii=True)
    return text + "\n"


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines whole or not at all."""
    write_atomic(path, "".join(to_json_line(record) for record in records))


def read_jsonl(path: str | Path, *, torn_last_line_ok: bool = False) -> Iterator[dict[str, Any]]:
    r"""Read JSON Lines (plain or `.gz`), split on `\n` only; blank lines are passed over.

    Args:
        path: the file.
        torn_last_line_ok: pass over a last line that is cut off, as an append-only file has one after a crash.

    Raises:
        UserError: the file is missing, or a line is no JSON object (the message names the line).
    """
    lines = _decode(path, _read_bytes(path), torn_end_ok=torn_last_line_ok).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        # Beside bad syntax: a number of thousands of digits, or thousands of nested brackets.
        except (ValueError, RecursionError) as error:
            if torn_last_line_ok and number == len(lines):
                return
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path}, line {number}: not valid JSON ({what})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
        yield record


def read_text(path: str | Path) -> str:
    """The whole text of a UTF-8 file (plain or `.gz`), without a byte-order mark.

    Raises:
        UserError: no such file, a folder, unreadable, or not UTF-8 (the message names the line).
    """
    return _decode(path, _read_bytes(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _read_bytes(path: str | Path) -> bytes:
    try:
        raw = Path(path).read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    # ValueError: a path with a NUL in it.
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


# How files begin that hold text, but not as it is read here.
_PACKED = {
    b"\xfd7zXZ\x00": "is compressed with xz; unpack it, or use gzip",
    b"BZh": "is compressed with bzip2; unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it, or use gzip",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a parquet file, expected text",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8 first",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8 first",
}


def not_utf8(path: str | Path, begin: bytes, line: int, bad: int) -> UserError:
    """What to say of bytes that are no UTF-8, by how the file begins."""
    for mark, what in _PACKED.items():
        if begin.startswith(mark):
            return UserError(f"{path}: {what}")
    return UserError(f"{path}, line {line}: not UTF-8 (byte 0x{bad:02x}); convert it first")


def _decode(path: str | Path, raw: bytes, *, torn_end_ok: bool = False) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if torn_end_ok and error.reason == "unexpected end of data":  # cut in the middle of a character
            return raw[: error.start].decode("utf-8-sig")
        line = raw.count(b"\n", 0, error.start) + 1
        raise not_utf8(path, raw[:8], line, raw[error.start]) from None


def iter_lines(path: str | Path) -> Iterator[str]:
    r"""The lines of a UTF-8 text file (plain or `.gz`) without their `\n`, one at a time, however large the file.

    Raises:
        UserError: as `read_text`, when the line in question is reached.
    """
    path = Path(path)
    number, begin = 0, b""
    try:
        with path.open("rb") as raw:
            begin = raw.read(8)
            zipped = begin[:2] == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if zipped else contextlib.nullcontext(raw) as file:
                for number, line in enumerate(file, start=1):
                    yield line.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, begin, number, error.object[error.start]) from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_lines(path: str | Path) -> list[str]:
    r"""The lines of a UTF-8 text file (plain or `.gz`), one segment a line.

    Lines are split on `\n` alone, so U+2028, U+0085 and a lone `\r` stay inside their segment; the `\r` of a CRLF
    line end and a leading byte-order mark are removed. A final line end makes no extra line.

    Raises:
        UserError: no such file, not UTF-8, or empty.
    """
    text = read_text(path)
    if not text:
        raise UserError(f"{path}: the file is empty")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if all(line.endswith("\r") for line in lines[: max(1, len(lines) - 1)]):
        lines = [line.removesuffix("\r") for line in lines]
    return lines


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_sha256(lines: Iterable[str]) -> str:
    r"""The SHA-256 of lines joined with `\n`, in hexadecimal: equal for files that differ in line ends or BOM only."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", errors="surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """The SHA-256 of a JSON value in canonical form (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
