"""A run that met with a mistake, a full disk or a deleted file goes on once that is mended, with the same results."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convexlm import cli
from convexlm.disk import disk_failure
from convexlm.errors import UserError
from convexlm.preflight import load_test_sets
from convexlm.recipe import load_recipe
from convexlm.run_checks import check_decoded
from convexlm.runs import RunFolder
from convexlm.training_identity import _means, _plain
from pipeline_helpers import recipe_with, write_recipe

TOY = {"name": "toy", "kind": "tinyworld", "pairs": ["en-de"], "size": 3, "seed": 5}
SHORT = recipe_with(seeds=[1], test_sets=[TOY])


def run_in(home: Path, run_dir: str = "run") -> int:
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.chdir(home)
        return cli.main(["run", "tiny.yaml", "--run_dir", run_dir])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    write_recipe(home, SHORT)
    # Named as an option's value is, it can be moved all the same.
    assert run_in(home, "mle") == 0
    return home


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "mle", tmp_path / "run")
    write_recipe(tmp_path, SHORT)
    return tmp_path


def comparison(home: Path) -> dict[str, Any]:
    return json.loads((home / "run" / "comparison.json").read_text())


@pytest.mark.slow
def test_a_report_that_was_killed_before_its_rename_is_written_anew(moved: Path) -> None:
    report = moved / "run" / "report.html"
    before = report.read_bytes()
    report.rename(moved / "run" / ".report.html")
    assert run_in(moved) == 0
    assert report.read_bytes() == before and not (moved / "run" / ".report.html").exists()


@pytest.mark.slow
def test_checkpoints_may_be_deleted_once_they_are_decoded(moved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = comparison(moved)
    for step in (3, 6):
        shutil.rmtree(moved / "run" / "train" / "mle" / f"checkpoint-{step}")
    (moved / "run" / "comparison.json").unlink()
    assert run_in(moved) == 0
    assert "mle checkpoint-6: it was deleted; its finished files are taken as they are" in capfd.readouterr().err
    assert comparison(moved) == before
    decoded = moved / "run" / "decode" / "mle" / "checkpoint-6" / "toy.en-de.greedy.jsonl"
    text = decoded.read_text()
    decoded.write_text(text.replace('"hypothesis": "', '"hypothesis": "x', 1))
    assert run_in(moved) == 2
    assert "was changed after it was written" in capfd.readouterr().err
    decoded.unlink()
    decoded.with_suffix(".meta.json").unlink()
    assert run_in(moved) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "checkpoint-6: no such folder, and" in line and "is still to be decoded from it" in line


@pytest.mark.slow
def test_damaged_files_that_are_derived_are_made_anew_or_named(moved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = comparison(moved)
    (truth,) = (moved / "run" / "decode" / "convex" / "checkpoint-6").glob("*.truth.json")
    truth.write_text('{"checkpoint_sha')
    (moved / "run" / "comparison.json").unlink()
    assert run_in(moved) == 0
    assert comparison(moved) == before
    scores = moved / "run" / "scores.jsonl"
    scores.write_text("[1]\n" + scores.read_text())
    assert run_in(moved) == 2
    assert "delete it, and `convexlm run` makes it anew" in capfd.readouterr().err
    scores.unlink()
    assert run_in(moved) == 0
    assert comparison(moved) == before


def test_a_prompt_without_room_for_its_answer_is_told_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    searches = [{"num_beams": 1, "max_new_tokens": 120}]
    write_recipe(tmp_path, recipe_with(seeds=[1], test_sets=[TOY], decode__searches=searches))
    assert run_in(tmp_path) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "test set `toy`, en-de: the prompt of sentence 0 has" in line
    assert "with max_new_tokens 120 (decode.searches) that is more than the model's 128 positions" in line
    assert not (tmp_path / "run" / "train").exists()
    mended = load_recipe(write_recipe(tmp_path, SHORT))
    assert RunFolder(tmp_path / "run").check(mended) is False


def test_changed_sources_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    (toy,) = load_test_sets(load_recipe(write_recipe(tmp_path, SHORT)))
    folder = RunFolder(tmp_path / "run")
    place = folder.path / "decode" / "mle" / "checkpoint-3"
    place.mkdir(parents=True)
    from convexlm.files import text_sha256

    meta = {"test_set": "toy", "pair": "en-de", "sources_sha256": text_sha256(toy.sources)}
    (place / "toy.en-de.greedy.meta.json").write_text(json.dumps(meta))
    (place / "other.en-de.greedy.meta.json").write_text(json.dumps({**meta, "test_set": "other"}))
    check_decoded(folder, [toy])
    changed = replace(toy, sources=[*toy.sources[:-1], "Something else."])
    with pytest.raises(UserError, match="test set `toy`, en-de: its sources have changed since .*put them back"):
        check_decoded(folder, [changed])


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("1", "1.0", True),
        ("0.0001", "1e-4", True),
        ("{'a': 1, 'b': 2}", "{'b': 2.0, 'a': 1}", True),
        ("1", "2", False),
        ("True", "1", False),
        ("mle", "MLE", False),
        (None, "None", False),
        ("['a', 'b']", "['b', 'a']", False),
    ],
)
def test_options_are_compared_by_their_values(text: Any, other: Any, same: bool) -> None:
    assert _means(text, other) == _means(other, text) == same


def test_only_paths_within_the_run_folder_move_with_it() -> None:
    options = {
        "objective": "mle",
        "output_dir": "mle/train/mle",
        "dataset": "mle/data/train.jsonl",
        "template": "mlex",
    }
    plain = _plain(options, RunFolder(Path("mle")))
    assert plain == {**options, "output_dir": "RUN/train/mle", "dataset": "RUN/data/train.jsonl"}


# -- the disk


class Full(RuntimeError):
    """As torch's writer raises it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), "x.pt: no space left on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the disk"),
        (Exception("No space left on device (os error 28)"), "no space left on the disk"),
        (Full("[enforce fail at inline_container.cc:672] . unexpected pos 61504 vs 61392"), "no space left on"),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/data"),
            "run/data: cannot be used (Permission denied)",
        ),
        (OSError(errno.EROFS, "Read-only file system", "r"), "r: cannot be used (Read-only file system)"),
        (OSError(errno.ECONNREFUSED, "refused"), None),
        (ValueError("of another kind"), None),
        (TypeError("f() got an unexpected positional argument"), None),
    ],
)
def test_errors_of_the_disk_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str | None
) -> None:
    from convexlm.verbs import theory

    assert (disk_failure(error) or "").startswith(said or "") and (disk_failure(error) is None) == (said is None)
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert disk_failure(wrapped) == disk_failure(error)

    def fail(args: Any) -> dict[str, Any]:
        raise wrapped

    monkeypatch.setattr(theory, "run", fail)
    words = ["theory", "--probabilities", "0.5", "0.5"]
    if said is None:
        with pytest.raises(RuntimeError):
            cli.main(words)
        return
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
