"""What a training of a run folder is made from: written beside its checkpoints before the first step, compared after.

`identity.json` in the training's folder holds `options` (as text), `inputs` (hashes of the local files behind them:
data, model, tokenizer, config, plugins) and `global_batch`. `done.json` has one hash of options and data files, which
is all that folders of earlier versions have; what they lack is taken as not known.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.dataset_names import dataset_path
from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, read_json_object, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from convexlm.runs import RunFolder

IDENTITY_FILE = "identity.json"

# How many processes share a global batch is no part of the options: a run may be decoded on another machine. Where
# the folder lies is none, and plugins count by their content.
_LEFT_OUT = ("gradient_accumulation_steps", "plugins")
_TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "chat_template*", "config.json"),
    *("special_tokens_map.json", "added_tokens.json", "*.py"),
)
_OTHER = {
    "dataset": "on other data",
    "eval_dataset": "with other data to evaluate on",
    "model_name_or_path": "from another model",
    "tokenizer_name": "with another tokenizer",
    "config_name": "from another config",
    "plugins": "with another plugin",
}


class InputHashes:
    """Hashes of files and folders, each taken once as long as sizes and times of change stay."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], str] = {}

    def of(self, options: Mapping[str, Any]) -> dict[str, str]:
        """The hash of every local file or folder that a training's options name; hub names have none."""
        found = {}
        ways: dict[str, Callable[[Path], Iterable[Path]]] = {
            "dataset": _data_files,
            "eval_dataset": _data_files,
            "tokenizer_name": _tokenizer_files,
            "config_name": lambda path: [path / "config.json"] if path.is_dir() else [path],
        }
        for key, files in ways.items():
            if options.get(key) and (path := dataset_path(str(options[key]))).exists():
                found[key] = self._hash(key, path, files(path), _files_sha256)
        model = options.get("model_name_or_path")
        if model and (path := Path(str(model)) / "config.json").is_file():
            found["model_name_or_path"] = self._hash("model", path.parent, path.parent.iterdir(), _model_sha256)
        for name in options.get("plugins") or []:
            if (source := _plugin_file(str(name))) is not None:
                found[f"plugins {name}"] = self._hash("plugins", source, [source], _files_sha256)
        return found

    def _hash(self, kind: str, path: Path, files: Iterable[Path], take: Callable[[Path, list[Path]], str]) -> str:
        own = sorted(file for file in files if file.is_file())
        stamps = tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in own)
        key = (kind, str(path), stamps)
        if key not in self._known:
            self._known[key] = take(path, own)
        return self._known[key]


def options_sha256(options: Mapping[str, Any], folder: RunFolder, hashes: InputHashes) -> str:
    """The hash of options and data files, as `done.json` keeps it; the run folder itself may be moved."""
    plain, inputs = _plain(options, folder), hashes.of(options)
    for key in ("dataset", "eval_dataset"):
        if options.get(key) and Path(options[key]).is_file():
            plain[key] = inputs[key]
    return json_sha256(plain)


def training_identity(
    options: Mapping[str, Any], folder: RunFolder, processes: int, hashes: InputHashes
) -> dict[str, Any]:
    """What `identity.json` keeps.

    Args:
        options: as `train_options` gives them.
        folder: the run folder.
        processes: how many train together.
        hashes: those taken so far in this run.
    """
    accumulated = int(options.get("gradient_accumulation_steps", 1))
    return {
        "options": {key: text for key, text in _plain(options, folder).items() if key != "output_dir"},
        "inputs": hashes.of(options),
        "global_batch": int(options.get("per_device_train_batch_size", 8)) * accumulated * processes,
    }


def write_identity(place: Path, identity: Mapping[str, Any]) -> None:
    """Keep an identity in a training's folder."""
    text = json.dumps(identity, indent=2) + "\n"
    if not (place / IDENTITY_FILE).exists() or (place / IDENTITY_FILE).read_text(encoding="utf-8") != text:
        write_atomic(place / IDENTITY_FILE, text)


def check_identity(
    place: Path,
    options: Mapping[str, Any],
    identity: Mapping[str, Any],
    *,
    done_sha256: tuple[str, str] | None = None,
    batch: bool = True,
) -> None:
    """Refuse to take a training for this recipe's that was made, or begun, from something else.

    Args:
        place: the training's folder; one without `identity.json` says nothing.
        options: as `train_options` gives them.
        identity: of the training as it would be now.
        done_sha256: the hash in `done.json`, and the one of now.
        batch: compare global batches, too.

    Raises:
        UserError: what differs, in one line.
    """
    kept = _kept(place)
    before, now = kept.get("inputs", {}), identity["inputs"]
    for key, digest in now.items():
        if key in before and before[key] != digest:
            name, _, plugin = key.partition(" ")
            raise UserError(
                f"{place}: trained {_OTHER[name]}: {plugin or options[name]} has changed since; put it back, or "
                "choose another --run_dir"
            )
    if "options" in kept:
        before, now = kept["options"], identity["options"]
        if differing := sorted(key for key in {*before, *now} if not _means(before.get(key), now.get(key))):
            key = differing[0]
            raise UserError(
                f"{place}: trained with other options: `{key}` was {before.get(key)} and is {now.get(key)} here; "
                "choose another --run_dir"
            )
    # The hash is of the options as they were spelled; where they are kept themselves, these were compared.
    known = "options" in kept and "inputs" in kept
    if done_sha256 is not None and done_sha256[0] != done_sha256[1] and not known:
        raise UserError(f"{place}: trained on other data or from another model; choose another --run_dir")
    if batch and kept.get("global_batch") not in (None, identity["global_batch"]):
        raise UserError(
            f"{place}: trained with a global batch of {kept['global_batch']}, here it is {identity['global_batch']}; "
            "start with as many processes as then (in a new run, `train.global_batch_size` keeps it on any number)"
        )


def _means(text: Any, other: Any) -> bool:
    """Whether two options' texts have one value: `1` is `1.0`, and the keys of a mapping have no order."""
    if text == other:
        return True
    try:
        one, two = ast.literal_eval(text), ast.literal_eval(other)
        return bool(one == two) and isinstance(one, bool) == isinstance(two, bool)
    except (ValueError, SyntaxError, TypeError):
        return False


def _kept(place: Path) -> dict[str, Any]:
    """The identity that a training's folder keeps; empty where there is none."""
    if not (place / IDENTITY_FILE).exists():
        return {}
    try:
        kept = read_json_object(place / IDENTITY_FILE)
        if bad := [key for key in ("inputs", "options") if not isinstance(kept.get(key, {}), dict)]:
            raise UserError(f"{place / IDENTITY_FILE}: its `{bad[0]}` is no JSON object")
    except UserError as error:
        raise UserError(f"{error}; put it back, or delete the folder {place}") from None
    return kept


def _plain(options: Mapping[str, Any], folder: RunFolder) -> dict[str, str]:
    root, depth = str(folder.path), len(folder.path.parts)

    def movable(text: str) -> str:
        path = Path(text)
        # No option names the folder itself; an objective may be called as it is.
        inside = len(path.parts) > depth and path.is_relative_to(folder.path)
        return "RUN" + str(path)[len(root) :] if inside else text

    return {key: movable(str(value)) for key, value in options.items() if key not in _LEFT_OUT}


def _data_files(path: Path) -> Iterable[Path]:
    return path.rglob("*") if path.is_dir() else [path]


def _tokenizer_files(path: Path) -> Iterable[Path]:
    return {file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)} if path.is_dir() else [path]


def _files_sha256(path: Path, files: list[Path]) -> str:
    if files == [path]:
        return file_sha256(path)
    return json_sha256({str(file.relative_to(path)): file_sha256(file) for file in files})


def _model_sha256(path: Path, files: list[Path]) -> str:
    from convexlm.decoding.checkpoint import checkpoint_sha256

    return checkpoint_sha256(path)


def _plugin_file(name: str) -> Path | None:
    """The source of a plugin, which is loaded; None for one that has no file."""
    if name.endswith(".py"):
        return Path(name)
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file else None
