"""COMET by way of files, since its package cannot be installed beside ours: what comet-score reads, and what it wrote.

    convexlm score ... --export_comet out/mle.jsonl     # and out/mle.src, out/mle.mt, out/mle.ref
    comet-score -s out/mle.src -t out/mle.mt -r out/mle.ref --model MODEL --to_json out/mle.comet.json
    convexlm report RUN --comet out/mle.comet.json --comet_model MODEL

What is read back is matched with a run's decode files by the text of its sources, hypotheses and references, so that
no score can end up with another system's output, or with a test set of other references.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import file_sha256, read_jsonl, read_text, text_sha256, write_atomic, write_jsonl
from convexlm.scoring import check_lengths, first_references

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from convexlm.runs import RunFolder

METRIC = "comet"
STREAMS = {"src": "src", "mt": "mt", "ref": "ref"}  # what comet-score calls them -> what our files end in


def export_comet(
    path: str | Path,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    inputs: Sequence[str | Path] = (),
) -> dict[str, str]:
    """Write `path` (JSON Lines of `src`, `mt`, `ref`) and, beside it, the three text files that comet-score reads.

    A line end or another sign that Python takes for one becomes a blank, for comet-score reads a line a segment. Files
    of an earlier export to the same path are replaced.

    Args:
        path: where to; ends in `.jsonl`.
        sources: one a segment.
        hypotheses: one a segment.
        references: one a segment.
        inputs: the files that these came from.

    Returns:
        The files by what they hold, and `command`, which scores them.

    Raises:
        UserError: streams of different length, a name that does not end in `.jsonl`, or a file that would be written
            over and is an input or no earlier export.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise UserError(f"--export_comet {path}: give a name that ends in .jsonl")
    check_lengths({"hypotheses": hypotheses, "sources": sources, "references": references})
    streams = {
        key: [_one_line(text) for text in texts]
        for key, texts in (("src", sources), ("mt", hypotheses), ("ref", references))
    }
    files = {key: str(path.with_suffix(f".{end}")) for key, end in STREAMS.items()}
    _refuse_to_write_over(path, [path, *map(Path, files.values())], [Path(one) for one in inputs])
    try:
        for key, texts in streams.items():
            write_atomic(files[key], "".join(f"{text}\n" for text in texts))
        write_jsonl(path, [dict(zip(streams, row, strict=True)) for row in zip(*streams.values(), strict=True)])
    except OSError as error:
        raise UserError(f"--export_comet {path}: cannot be written ({error.strerror or error})") from None
    scored = path.with_suffix(".comet.json")
    command = f"comet-score -s {files['src']} -t {files['mt']} -r {files['ref']} --to_json {scored}"
    return {"jsonl": str(path), **files, "command": command}


def _refuse_to_write_over(path: Path, targets: Sequence[Path], inputs: Sequence[Path]) -> None:
    try:
        there = [target for target in targets if target.exists()]
    except OSError as error:
        raise UserError(f"--export_comet {path}: cannot be written ({error.strerror or error})") from None
    for target in there:
        if any(one.exists() and target.samefile(one) for one in inputs):
            raise UserError(f"--export_comet {path}: would write over {target}, which is read here; give another name")
    # The JSON Lines come last, so where they are there, so are the other three.
    earlier = path.exists() and _is_export(path)
    if there and not earlier:
        raise UserError(
            f"--export_comet {path}: {there[0]} is there, and is no earlier export; nothing was written: give another "
            "name or remove it"
        )


def _is_export(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            return set(json.loads(stream.readline())) == set(STREAMS)
    except (OSError, ValueError, TypeError):
        return False


def read_comet(path: str | Path) -> list[list[dict[str, Any]]]:
    """The systems of a `comet-score --to_json` file: for each its segments, with `src`, `mt` and `COMET`.

    Raises:
        UserError: no such file, or none that comet-score wrote.
    """
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: expected what `comet-score --to_json` writes, a list of segments by file name")
    for name, segments in found.items():
        if not isinstance(segments, list) or not segments:
            raise UserError(f"{path}: no segments under `{name}`")
        for number, row in enumerate(segments, start=1):
            texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("src", "mt"))
            value = row.get("COMET") if texts else None
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(
                    f"{path}, `{name}`, segment {number}: needs the texts `src`, `mt` and a number `COMET`"
                )
    return list(found.values())


def import_comet(folder: RunFolder, paths: Sequence[str | Path], model: str | None = None) -> list[dict[str, Any]]:
    """Add the scores of comet-score files to a run's `scores.jsonl`, in place of those of the same outputs.

    Args:
        folder: a run folder that was scored.
        paths: what `comet-score --to_json` wrote.
        model: the COMET model's name, for the signature; comet-score's file does not say it.

    Returns:
        The rows that were added, one a decode file: `metric` is `comet`, `score` the mean over segments, on the
        model's own scale.

    Raises:
        UserError: a file cannot be read, has a system that is no output of this run or was scored against references
            that are not the test set's, or two say something else of one output.
    """
    if not folder.scores.is_file():
        raise UserError(f"{folder.path}: there is no scores.jsonl to add to; run the recipe first")
    rows = list(read_jsonl(folder.scores))
    known, streams = _outputs(folder, rows), _reference_streams(folder)
    added: dict[tuple[Any, ...], dict[str, Any]] = {}
    kept_values: dict[str, list[float]] = {}
    for path in paths:
        digest = file_sha256(path) if Path(path).is_file() else ""
        for segments in read_comet(path):
            key = _key([row["src"] for row in segments], [row["mt"] for row in segments])
            if key not in known:
                raise UserError(
                    f"{path}: its {len(segments)} sources and outputs are those of no decode file that {folder.path} "
                    "scored; export them with `convexlm score --export_comet`"
                )
            values = [float(row["COMET"]) for row in segments]
            signature = f"comet|model:{model or 'not stated'}|segments:{len(segments)}|json:{digest[:16]}"
            name = text_sha256(map(repr, values))
            kept_values[name] = values
            about_file = {"num_sentences": len(segments), "json_sha256": digest, "imported": True, "segments": name}
            for about in _of_these_references(path, segments, known[key], streams):
                score = {"metric": METRIC, "score": sum(values) / len(values), "signature": signature}
                row = about | score | about_file | _references(segments)
                if added.setdefault(_place(row), row)["segments"] != name:
                    raise UserError(
                        f"{path}: other scores of {about['arm']}, {about['test_set']} {about['pair']}, "
                        f"{about['search']} were given before; give one file for each output"
                    )
    for name, values in kept_values.items():
        write_atomic(_segments_path(folder, name), json.dumps(values) + "\n")
    kept = [row for row in rows if row.get("metric") != METRIC or _place(row) not in added]
    write_jsonl(folder.scores, [*kept, *added.values()])
    return list(added.values())


def segments_file(folder: RunFolder, row: Mapping[str, Any]) -> Path:
    """Where a run keeps the imported scores of one decode file's segments: a JSON list of numbers, in its order.

    Args:
        folder: the run folder.
        row: of its `scores.jsonl`, an imported one. Earlier versions named the file by the outputs' hash alone.
    """
    return _segments_path(folder, str(row.get("segments") or row.get("hypotheses_sha256")))


def _segments_path(folder: RunFolder, name: str) -> Path:
    return folder.path / "comet" / f"{name}.json"


def _reference_streams(folder: RunFolder) -> dict[tuple[str, str], set[str]]:
    """The hashes of a run's references, as comet-score reads them, by test set and direction; empty if it has none."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in read_jsonl(folder.references) if folder.references.is_file() else ():
        streams = row.get("references") or []
        whole = [*streams, first_references(streams)] if streams else []
        found[str(row.get("test_set")), str(row.get("pair"))] = {text_sha256(map(_one_line, one)) for one in whole}
    return found


def _of_these_references(
    path: str | Path,
    segments: Sequence[dict[str, Any]],
    places: Sequence[dict[str, Any]],
    streams: Mapping[tuple[str, str], set[str]],
) -> list[dict[str, Any]]:
    """Those places whose references were scored against; all, if the model takes none."""
    texts = [row.get("ref") for row in segments]
    if not all(isinstance(text, str) for text in texts):
        return list(places)
    digest = text_sha256(_one_line(str(text)) for text in texts)
    # The references of a validation set, and of a run of an earlier version, are not kept.
    fit = [one for one in places if digest in streams.get((one["test_set"], one["pair"]), {digest})]
    if not fit:
        sets = " or ".join(dict.fromkeys(f"{one['test_set']} {one['pair']}" for one in places))
        raise UserError(
            f"{path}: {len(segments)} outputs of {sets} were scored against other references than the test set's; "
            "`convexlm score --export_comet` writes the right ones"
        )
    return fit


def _references(segments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The hash of the references that comet-score saw; None for a model that takes none."""
    texts = [row.get("ref") for row in segments]
    whole = all(isinstance(text, str) for text in texts)
    return {"references_sha256": [text_sha256([str(text) for text in texts])] if whole else None}


def imported_rows(path: Path, scored: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The imported rows of an older `scores.jsonl` whose outputs are still those of `scored`."""
    if not path.is_file():
        return []
    now = {(_place(row), row.get("hypotheses_sha256")) for row in scored}
    try:
        old = list(read_jsonl(path, torn_last_line_ok=True))
    except UserError as error:  # they cannot be computed again here
        raise UserError(f"{error}; mend or delete it (imported scores are lost with it: import them again)") from None
    return [row for row in old if row.get("imported") and (_place(row), row.get("hypotheses_sha256")) in now]


ABOUT = ("arm", "seed", "checkpoint", "role", "test_set", "pair", "search")


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ABOUT)


def _outputs(folder: RunFolder, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What every scored decode file is, by the hash of its sources and hypotheses; equal outputs share one."""
    arms = {(row["arm"], row["seed"]) for row in rows}
    several = len({seed for _, seed in arms}) > 1
    hashes = {_place(row): row["hypotheses_sha256"] for row in rows if row.get("hypotheses_sha256")}
    found: dict[str, list[dict[str, Any]]] = {}
    for place, digest in hashes.items():
        about = dict(zip(ABOUT, place, strict=True))
        name = f"{about['arm']}.seed{about['seed']}"
        if not several or not (folder.path / "decode" / name).is_dir():
            name = str(about["arm"])  # of a run that began with one seed
        file = f"{about['test_set']}.{about['pair']}.{about['search']}.jsonl"
        path = folder.path / "decode" / name / str(about["checkpoint"]) / file
        records = list(read_jsonl(path))
        key = _key([str(r.get("source", "")) for r in records], [str(r.get("hypothesis", "")) for r in records])
        found.setdefault(key, []).append(about | {"hypotheses_sha256": digest})
    return found


def _key(sources: Sequence[str], hypotheses: Sequence[str]) -> str:
    # comet-score strips its lines.
    return text_sha256([_one_line(text) for text in [*sources, *hypotheses]])


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()).strip()
