"""Test sets: from an entry of a recipe to sources, references and ids.

A kind of test set is one function, registered under its name: `files` (plain text, a path pattern for every stream),
`sacrebleu` (a set that sacreBLEU knows, read through its own dataset code), `summarization` (documents and summaries)
and `tinyworld` (the embedded corpus).
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_lines
from convexlm.segments import read_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Loader = Callable[[Mapping[str, Any], str, Path], "TestSet"]

# Kinds whose module registers them; imported when a recipe asks for one.
_LAZY_KINDS = {"summarization": "convexlm.testsets_summarization", "tinyworld": "convexlm.tinyworld.testset"}
_COMMON_KEYS = ("name", "kind", "skip", "limit", "pairs")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]*")
_KINDS: dict[str, tuple[Loader, tuple[str, ...] | None]] = {}


@dataclass(frozen=True)
class TestSet:
    """The sentences of one test set in one direction.

    Attributes:
        name: the test set's name, fit to be part of a file name.
        pair: the direction, such as `en-de`.
        sources: the source segments.
        references: reference streams, each as long as `sources`; empty if there are none.
        ids: one id a segment; its line number from 0 unless the kind says otherwise.
        meta: what else the kind knows, JSON-ready.
    """

    name: str
    pair: str
    sources: list[str]
    references: list[list[str]]
    ids: list[str]
    meta: dict[str, Any] = field(default_factory=dict)

    # The class is no test, whatever pytest makes of its name.
    __test__ = False


class NotAtHandError(UserError):
    """A test set exists but has to be downloaded first, and that failed."""


def register_test_set_kind(name: str, *, keys: Sequence[str] | None = None) -> Callable[[Loader], Loader]:
    """Register the function `(spec, pair, base_dir) -> TestSet` that reads test sets of kind `name`.

    Args:
        name: what recipes write after `kind:`.
        keys: the entries that this kind knows beside `name`, `kind`, `skip`, `limit` and `pairs`; others are refused.
            None means that the function checks them itself.
    """

    def register(loader: Loader) -> Loader:
        if name in _KINDS and _KINDS[name][0] is not loader:
            raise ValueError(f"test set kind {name!r} is registered already")
        _KINDS[name] = (loader, None if keys is None else tuple(keys))
        return loader

    return register


def known_kinds() -> list[str]:
    """The names of all kinds, those not imported yet included."""
    return sorted(set(_KINDS) | set(_LAZY_KINDS))


def load_test_set(spec: Mapping[str, Any], pair: str, base_dir: str | Path = ".") -> TestSet:
    """Read the test set that a recipe's entry describes.

    Args:
        spec: `name`, `kind` (`files` where it has `sources`), optionally `skip` (leave out the first N lines: of one
            file, validate on the first part and test on the rest), `limit` (at most N lines) and `pairs` (the
            directions it has), and what the kind needs: for `files`, `sources` and optionally `references`, path
            patterns with `{pair}`, `{src}`, `{tgt}`; for `sacrebleu`, optionally `references: [A]`, the translators;
            for `summarization`, `file`.
        pair: the direction, such as `en-de`.
        base_dir: the folder that relative paths start from.

    Raises:
        UserError: an unknown kind or entry, a pair that the set does not have, a file that cannot be read, streams
            of different length, an empty set, or a limit below 1.
    """
    from convexlm.templates import split_pair

    name = str(spec.get("name"))
    in_files = name_in_files(spec.get("name"))
    split_pair(pair)
    skip, limit = spec.get("skip"), spec.get("limit")
    for key, value, least in (("skip", skip, 0), ("limit", limit, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"test set `{name}`: `{key}` must be a whole number of at least {least}, not {value!r}")
    if (pairs := spec.get("pairs")) is not None and pair not in pairs:
        raise UserError(f"test set `{name}` has no pair `{pair}`; it has: {', '.join(map(str, pairs))}")
    test_set = _find_loader(spec, name)(spec, pair, Path(base_dir))
    if not test_set.sources:
        raise UserError(f"test set `{name}`, {pair}: there is no sentence in it")
    if skip and skip >= len(test_set.sources):
        raise UserError(f"test set `{name}`, {pair}: `skip: {skip}` leaves none of its {len(test_set.sources)} lines")
    # Another kind's function may have given it a name of its own.
    test_set = dataclasses.replace(test_set, name=in_files if test_set.name == name else test_set.name)
    return part_of(test_set, skip or 0, limit)


def name_in_files(name: Any) -> str:
    """A test set's name as files and results have it: sacreBLEU's `wmt14/full` is `wmt14_full` there.

    Raises:
        UserError: it is no name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            "test set: `name` must be letters, digits, `.`, `_`, `+`, `-` or `/`, beginning with one of the first "
            f"two, not {name!r}"
        )
    return name.replace("/", "_")


def part_of(test_set: TestSet, skip: int = 0, limit: int | None = None) -> TestSet:
    """The segments of a test set after the first `skip`, at most `limit` of them; ids and `meta` are kept."""
    part = slice(skip, None if limit is None else skip + limit)
    return dataclasses.replace(
        test_set,
        sources=test_set.sources[part],
        references=[stream[part] for stream in test_set.references],
        ids=test_set.ids[part],
    )


def _find_loader(spec: Mapping[str, Any], name: str) -> Loader:
    kind = spec.get("kind") or ("files" if "sources" in spec else None)
    if kind is None:
        raise UserError(f"test set `{name}`: give `sources:` (files) or `kind:` ({', '.join(known_kinds())})")
    if not isinstance(kind, str):
        raise UserError(f"test set `{name}`: `kind` must be a name such as files, not {kind!r}")
    if kind not in _KINDS and kind in _LAZY_KINDS:
        importlib.import_module(_LAZY_KINDS[kind])
    if kind not in _KINDS:
        raise UserError(f"test set `{name}`: unknown kind `{kind}`; known: {', '.join(known_kinds())}")
    loader, keys = _KINDS[kind]
    if keys is not None and (unknown := [key for key in spec if key not in (*_COMMON_KEYS, *keys)]):
        known = ", ".join(sorted({*_COMMON_KEYS, *keys}))
        raise UserError(f"test set `{name}`: unknown entry `{unknown[0]}` for kind `{kind}`; known: {known}")
    return loader


@register_test_set_kind("files", keys=("sources", "references"))
def load_files(spec: Mapping[str, Any], pair: str, base_dir: Path) -> TestSet:
    """Plain text files (or `.gz`), one segment a line, at paths with `{pair}`, `{src}` and `{tgt}` in them."""
    name = spec["name"]
    source_path = _fill(spec.get("sources"), pair, base_dir, name, "sources")
    if not source_path.exists():
        raise UserError(f"test set `{name}` has no pair `{pair}`: {source_path}: no such file")
    sources = read_plain(source_path, "source")
    patterns = spec.get("references") or []
    streams = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = _fill(pattern, pair, base_dir, name, "references")
        stream = read_plain(path, "reference")
        if len(stream) != len(sources):
            raise UserError(
                f"test set `{name}`, {pair}: {source_path} has {len(sources)} lines but {path} has {len(stream)}"
            )
        streams.append(stream)
    return TestSet(name.replace("/", "_"), pair, sources, streams, _line_ids(sources), {"kind": "files"})


@register_test_set_kind("sacrebleu", keys=("references",))
def load_sacrebleu(spec: Mapping[str, Any], pair: str, base_dir: Path) -> TestSet:
    """A test set that sacreBLEU knows by name, through its own dataset code, which downloads it on first use.

    `references` names translators (`[A]`, `[A, B]`); without it, the references are those that sacreBLEU itself
    scores against.
    """
    from sacrebleu import __version__ as version
    from sacrebleu.dataset import DATASETS
    from sacrebleu.utils import SACREBLEU_DIR

    name = spec["name"]
    if name not in DATASETS:
        raise UserError(f"sacreBLEU has no test set `{name}`; `sacrebleu --list` prints those it has")
    dataset = DATASETS[name]
    if pair not in dataset.langpairs:
        raise UserError(f"sacreBLEU's `{name}` has no pair `{pair}`; it has: {', '.join(sorted(dataset.langpairs))}")
    try:
        fields = dict(zip(dataset.fieldnames(pair), dataset.get_files(pair), strict=True))
        reference_files = list(dataset.get_reference_files(pair))
    # Its download ends in SystemExit on some errors, and in whatever urllib, tarfile or lxml raise on others.
    except (Exception, SystemExit) as error:
        raise NotAtHandError(
            f"sacreBLEU's `{name}` {pair} cannot be read ({type(error).__name__}: {error}); sacreBLEU downloads it on "
            f"first use: run once with a network, or set SACREBLEU to a folder that has it (now {SACREBLEU_DIR})"
        ) from None
    if "references" in spec:
        labels = spec["references"]
        reference_files = []
        for label in [labels] if isinstance(labels, str) else labels or []:
            if f"ref:{label}" not in fields:
                known = sorted(key.removeprefix("ref:") for key in fields if key.startswith("ref:"))
                raise UserError(f"sacreBLEU's `{name}` {pair} has no reference `{label}`; it has: {', '.join(known)}")
            reference_files.append(fields[f"ref:{label}"])
    sources = read_lines(fields["src"])
    streams = [read_lines(path) for path in reference_files]
    for path, stream in zip(reference_files, streams, strict=True):
        if len(stream) != len(sources):
            raise UserError(f"sacreBLEU's `{name}` {pair}: {len(sources)} sources but {len(stream)} lines in {path}")
    meta = {"kind": "sacrebleu", "sacrebleu": version, "references": [Path(path).name for path in reference_files]}
    return TestSet(name.replace("/", "_"), pair, sources, streams, _line_ids(sources), meta)


def _line_ids(sources: list[str]) -> list[str]:
    return [str(number) for number in range(len(sources))]


def _fill(pattern: object, pair: str, base_dir: Path, name: str, key: str) -> Path:
    if not isinstance(pattern, str) or not pattern:
        raise UserError(f"test set `{name}`: `{key}` must be a file path, not {pattern!r}")
    source, target = pair.split("-")
    # Plain replacement: a path may hold braces that `str.format` would stumble over.
    text = pattern.replace("{pair}", pair).replace("{src}", source).replace("{tgt}", target)
    if left := re.search(r"\{[A-Za-z_]+\}", text):
        raise UserError(
            f"test set `{name}`: unknown placeholder {left.group()} in `{key}`; known: {{pair}}, {{src}}, {{tgt}}"
        )
    return base_dir / Path(text).expanduser()
