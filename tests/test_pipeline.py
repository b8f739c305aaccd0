"""`convexlm run` on an experiment of a few seconds: run once, run again, and killed at every stage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from convexlm import cli
from convexlm.recipe import load_recipe
from convexlm.report.data import read_run
from convexlm.runs import RunFolder, trained_runs
from pipeline_helpers import call, kill_when, recipe_with, results, snapshot, start, write_recipe

pytestmark = pytest.mark.slow
TOY = {"name": "toy", "kind": "tinyworld", "pairs": ["en-de"], "size": 3, "seed": 5}
SHORT = recipe_with(seeds=[1], test_sets=[TOY])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and the run that was never stopped."""
    home = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(home)
    done = call(["run", recipe, "--run_dir", "run", "--json"], home)
    assert done.returncode == 0, done.stderr
    (home / "result.json").write_text(done.stdout)
    (home / "stderr.txt").write_text(done.stderr)
    return home


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one seed and one pair, for the tests that stop it and go on."""
    home = tmp_path_factory.mktemp("short")
    done = call(["run", write_recipe(home, SHORT), "--run_dir", "run"], home)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to break."""
    shutil.copytree(finished / "run", tmp_path / "run")
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture
def broken(short: Path, tmp_path: Path) -> Path:
    """A copy of the short run, to break."""
    shutil.copytree(short / "run", tmp_path / "run")
    write_recipe(tmp_path, SHORT)
    return tmp_path


def run_here(home: Path, *words: str) -> None:
    """`convexlm run` in this process, which has torch in memory already."""
    with contextlib.chdir(home) if hasattr(contextlib, "chdir") else _chdir(home):
        assert cli.main(["run", "tiny.yaml", "--run_dir", "run", *words]) == 0


@contextlib.contextmanager
def _chdir(path: Path) -> Any:  # Python 3.10
    old = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(old)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    import signal

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


# -- one run


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    folder, recipe = RunFolder(finished / "run"), load_recipe(finished / "tiny.yaml")
    for run in trained_runs(recipe):
        assert (folder.train(run) / "metrics.jsonl").is_file()
        assert json.loads((folder.train(run) / "done.json").read_text())["records"] == 200
        steps = [60] if run.arm == "base" else [3, 6]
        assert sorted(path.name for path in folder.train(run).glob("checkpoint-*")) == [
            f"checkpoint-{step}" for step in steps
        ]
    decoded = sorted(path for path in (finished / "run" / "decode").rglob("*.jsonl"))
    assert len(decoded) == 2 * 2 * 2 * 2 * 2
    for path in decoded:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        assert [row["id"] for row in rows] == [str(number) for number in range(3)]
        assert path.with_suffix(".meta.json").is_file()
    assert folder.report.is_file() and "<html" in folder.report.read_text()
    assert not list((finished / "run").rglob("*.part")) and not list((finished / "run").rglob("*.tmp"))


def test_the_result_is_one_json_object_and_the_stages_are_told(finished: Path) -> None:
    out, err = (finished / "result.json").read_text(), (finished / "stderr.txt").read_text()
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["run_dir"] == "run" and result["report"] == "run/report.html"
    assert result["comparison"] == json.loads((finished / "run" / "comparison.json").read_text())
    for stage in ("[1/5] data", "[2/5] train base.seed1", "[3/5] decode mle.seed1", "[4/5] score", "[5/5] report"):
        assert stage in err
    assert "Traceback" not in err and "Warning" not in err


def test_every_combination_is_scored_once(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "run" / "scores.jsonl").read_text().split("\n")[:-1]]
    keys = [(r["arm"], r["seed"], r["checkpoint"], r["test_set"], r["pair"], r["search"], r["metric"]) for r in rows]
    assert len(set(keys)) == len(keys) == 32 * 4
    assert {row["metric"] for row in rows} == {"bleu", "chrf", "mode_share", "valid_share"}
    for row in rows:
        if row["metric"] == "bleu":
            assert f"tok:{'zh' if row['pair'] == 'en-zh' else '13a'}" in row["signature"]


def test_arms_start_from_where_the_other_ended(finished: Path) -> None:
    import torch
    from safetensors.torch import load_file

    def weights(run: str, step: int) -> torch.Tensor:
        return load_file(finished / f"run/train/{run}/checkpoint-{step}/model.safetensors")["model.norm.weight"]

    base = weights("base.seed1", 60)
    for arm in ("mle", "convex"):
        # Far nearer to their start than the start is to a new model's ones.
        assert 0 < (weights(f"{arm}.seed1", 3) - base).abs().max() < 0.1
    assert not torch.equal(weights("base.seed1", 60), weights("base.seed2", 60))
    assert not torch.equal(weights("mle.seed1", 6), weights("convex.seed1", 6))


def test_a_second_run_does_nothing(copied: Path, finished: Path) -> None:
    before = snapshot(copied / "run")
    done = call(["run", "tiny.yaml", "--run_dir", "run", "--json"], copied)
    assert done.returncode == 0, done.stderr
    assert snapshot(copied / "run") == before
    first, again = json.loads((finished / "result.json").read_text()), json.loads(done.stdout)
    assert first.pop("seconds") > again.pop("seconds")
    assert first == again
    assert done.stderr.count(": done") == 6 + 8


def test_another_working_folder_and_a_moved_run_are_the_same_run(copied: Path) -> None:
    before = snapshot(copied / "run")
    (copied / "run").rename(copied / "moved")
    with _chdir(copied.parent):
        assert cli.main(["run", str(copied / "tiny.yaml"), "--run_dir", str(copied / "moved")]) == 0
    after = snapshot(copied / "moved")
    assert {name: stamp for name, stamp in after.items() if name != "report.html"} == {
        name: stamp for name, stamp in before.items() if name != "report.html"
    }


# -- killed, and run again


def test_killed_while_data_is_written(short: Path, tmp_path: Path) -> None:
    """What follows is a whole run in another process, so this is also the test that seeds give the same scores."""
    write_recipe(tmp_path, SHORT)
    process = start(["run", "tiny.yaml", "--run_dir", "run"], tmp_path)
    kill_when(process, (tmp_path / "run" / "data").is_dir)
    assert not (tmp_path / "run" / "train").is_dir()
    run_here(tmp_path)
    assert results(tmp_path / "run") == results(short / "run")


def test_killed_between_the_pieces_of_data(broken: Path, short: Path) -> None:
    for name in ("train", "decode"):
        shutil.rmtree(broken / "run" / name)
    for name in ("scores.jsonl", "comparison.json", "report.html"):
        (broken / "run" / name).unlink()
    data = broken / "run" / "data"
    (data / "tokenizer").rename(data / ".tokenizer")  # killed before the tokenizer had its name
    (data / ".tokenizer" / "tokenizer.json").write_text("{")
    (data / ".train.jsonl.abc.tmp").write_text('{"instr')
    (data / "model" / "config.json").unlink()
    run_here(broken)
    assert results(broken / "run") == results(short / "run")


def test_killed_in_training_after_a_checkpoint(short: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, SHORT)
    process = start(["run", "tiny.yaml", "--run_dir", "run"], tmp_path)
    train = tmp_path / "run" / "train" / "mle"
    kill_when(process, (train / "checkpoint-3" / "convexlm.json").is_file)
    assert not (train / "done.json").exists()
    run_here(tmp_path)
    err = capfd.readouterr().err
    assert "[2/5] train base (1 of 3): done" in err
    assert "mle: going on from checkpoint-" in err
    assert results(tmp_path / "run") == results(short / "run")
    steps = [json.loads(line)["step"] for line in (train / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert steps == [2, 4, 6]


def forget(home: Path, *names: str) -> None:
    """Take away what comes after a stage."""
    for name in ("scores.jsonl", "comparison.json", "report.html", *names):
        path = home / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_killed_in_the_middle_of_saving(broken: Path, short: Path) -> None:
    train = broken / "run" / "train" / "mle"
    forget(broken, "decode", "train/mle/done.json")
    (train / "checkpoint-6" / "convexlm.json").unlink()
    (train / "checkpoint-6" / "model.safetensors").write_bytes(b"half of it")
    lines = (train / "metrics.jsonl").read_text()
    (train / "metrics.jsonl").write_text(lines + '{"step": 6, "lo')
    run_here(broken)
    assert results(broken / "run") == results(short / "run")
    assert (train / "metrics.jsonl").read_text().count("\n") == 3


def test_killed_between_the_last_checkpoint_and_the_note_that_training_is_done(broken: Path, short: Path) -> None:
    forget(broken, "decode", "train/mle/done.json", "train/convex/done.json")
    run_here(broken)
    train = broken / "run" / "train"
    assert sorted(path.name for path in train.glob("*/checkpoint-*")) == sorted(
        path.name for path in (short / "run" / "train").glob("*/checkpoint-*")
    )
    assert results(broken / "run") == results(short / "run")


def test_killed_while_decoding(short: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, SHORT)
    shutil.copytree(short / "run", tmp_path / "run")
    forget(tmp_path, "decode")
    process = start(["run", "tiny.yaml", "--run_dir", "run"], tmp_path)
    decode = tmp_path / "run" / "decode"
    kill_when(process, lambda: len(list(decode.glob("*/*/*.jsonl"))) > 1 and list(decode.glob("*/*/*.part")))
    run_here(tmp_path)
    assert not list(decode.rglob("*.part"))
    assert results(tmp_path / "run") == results(short / "run")


def test_killed_in_the_middle_of_a_decode_file(broken: Path, short: Path) -> None:
    """A part file of one batch and a torn line is gone on with; a torn header is begun again."""
    forget(broken)
    where = broken / "run" / "decode" / "mle" / "checkpoint-6"
    whole = where / "toy.en-de.beam2.jsonl"
    before = whole.read_bytes()
    whole.with_suffix(".meta.json").unlink()
    whole.unlink()
    process = start(["run", "tiny.yaml", "--run_dir", "run"], broken)
    part = where / (whole.name + ".part")
    kill_when(process, lambda: (part.exists() and part.read_bytes().count(b"\n") > 1) or whole.exists())
    if part.exists():
        part.write_bytes(part.read_bytes()[:-7])
    run_here(broken)
    assert whole.read_bytes() == before
    assert results(broken / "run") == results(short / "run")


@pytest.mark.parametrize("lost", ["scores.jsonl", "comparison.json", "report.html", "data/references.jsonl"])
def test_killed_while_scoring_and_reporting(copied: Path, finished: Path, lost: str) -> None:
    """Every file of the last stages is written whole, so a kill shows as the one or the other missing."""
    (copied / "run" / lost).unlink()
    (copied / "run" / f".{Path(lost).name}.x.tmp").write_text("half")
    run_here(copied)
    assert results(copied / "run") == results(finished / "run")
    assert lost == "scores.jsonl" or (copied / "run" / lost).read_bytes() == (finished / "run" / lost).read_bytes()


# -- what a finished run does not take for its own


def test_data_that_changed_under_a_finished_run_is_refused(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = copied / "run" / "data" / "train.jsonl"
    data.write_text(data.read_text().split("\n", 1)[1])
    before = snapshot(copied / "run" / "train")
    with _chdir(copied):
        assert cli.main(["run", "tiny.yaml", "--run_dir", "run"]) == 2
    assert "trained on other data" in capfd.readouterr().err
    assert snapshot(copied / "run" / "train") == before


def test_a_second_run_at_the_same_time_is_refused(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(300)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, copied / "run" / ".lock"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with _chdir(copied):
            assert cli.main(["run", "tiny.yaml", "--run_dir", "run"]) == 2
    finally:
        other.kill()
        other.wait()
    err = capfd.readouterr().err
    assert err == "convexlm run: error: run: another `convexlm run` is at work here\n"


def test_a_run_trained_on_many_processes_is_done_on_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How a global batch was shared is no part of what was trained."""
    from convexlm.pipeline import train_options, world_size
    from convexlm.training_identity import InputHashes, options_sha256, training_identity

    def identities() -> tuple[str, dict[str, Any]]:
        options = train_options(recipe, folder, run)
        hashes = InputHashes()
        return options_sha256(options, folder, hashes), training_identity(options, folder, world_size(), hashes)

    recipe = load_recipe(write_recipe(tmp_path, recipe_with(train__global_batch_size=32)))
    folder = RunFolder(finished / "run")
    run = trained_runs(recipe)[0]
    alone = identities()
    assert alone[1]["global_batch"] == 32
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert identities() == alone


# -- selection


def test_test_sets_are_decoded_from_the_selected_checkpoints_alone(copied: Path, tmp_path: Path) -> None:
    """Over trained arms: decoded, killed in the middle, gone on with, and once more with nothing left to do."""
    dev = [{"name": "dev", "kind": "tinyworld", "pairs": ["en-de"], "size": 8, "seed": 9}]
    write_recipe(copied, recipe_with(selection="validation", validation_sets=dev))
    forget(copied, "decode", "recipe.yaml")
    (copied / "run" / "recipe.yaml").write_text(
        yaml.safe_dump(load_recipe(copied / "tiny.yaml").resolved, sort_keys=False)
    )
    run_here(copied)
    run = copied / "run"
    chosen = json.loads((run / "selection.json").read_text())["chosen"]
    assert set(chosen) == {"mle.seed1", "mle.seed2", "convex.seed1", "convex.seed2"}
    decoded = {str(path.relative_to(run / "decode")) for path in run.glob("decode/*/*/*.jsonl")}
    tests = {f"toy.{pair}.{search}.jsonl" for pair in ("en-de", "en-zh") for search in ("greedy", "beam2")}
    assert decoded == {
        *(f"{name}/checkpoint-{step}/dev.en-de.greedy.jsonl" for name in chosen for step in (3, 6)),
        *(f"{name}/{checkpoint}/{file}" for name, checkpoint in chosen.items() for file in tests),
    }
    before, first = snapshot(run), results(run)
    run_here(copied)
    assert snapshot(run) == before
    # Killed between selecting and decoding, with a torn selection.
    shutil.rmtree(run / "decode" / "mle.seed1" / chosen["mle.seed1"])
    (run / "selection.json").write_text('{"chosen": {"mle.seed1"')
    (run / "comparison.json").unlink()
    run_here(copied)
    assert results(run) == first
    assert {str(path.relative_to(run / "decode")) for path in run.glob("decode/*/*/*.jsonl")} == decoded


def test_a_recipe_that_got_another_seed_and_arm_goes_on_with_what_is_done(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "arms__base__max_steps": 6,
        "arms__base__save_steps": 6,
        "decode__checkpoints": "last",
        "decode__searches": [{"num_beams": 1, "max_new_tokens": 12}],
    }
    write_recipe(tmp_path, recipe_with(seeds=[1], arms__convex=None, **small))
    run_here(tmp_path)
    run = tmp_path / "run"
    before = {place: snapshot(run / place) for place in ("train/base", "train/mle", "decode/mle")}
    rows = (run / "scores.jsonl").read_text().splitlines()
    write_recipe(tmp_path, recipe_with(seeds=[2, 1], **small))
    run_here(tmp_path)
    for place, files in before.items():
        assert snapshot(run / place) == files
    names = ["base", "base.seed2", "convex", "convex.seed2", "mle", "mle.seed2"]
    assert sorted(path.name for path in (run / "train").iterdir()) == names
    now = (run / "scores.jsonl").read_text().splitlines()
    assert len(now) == 4 * len(rows) and set(rows) <= set(now)
    told = json.loads((run / "comparison.json").read_text())
    assert told["seeds"] == [2, 1] and sorted(told["checkpoints"]) == names[2:]
    report = read_run(run)
    assert sorted(one.name for one in report.runs) == names[2:] and sorted(report.metrics) == names[2:]


def test_a_validation_set_that_is_the_test_set_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    same = [{"name": "dev", "kind": "tinyworld", "pairs": ["en-de"], "size": 3, "seed": 5}]
    write_recipe(tmp_path, recipe_with(selection="validation", validation_sets=same))
    with _chdir(tmp_path):
        assert cli.main(["run", "tiny.yaml", "--run_dir", "run"]) == 2
    assert "3 of its 3 sentence pairs are in the test set `toy`" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    searches = [{"do_sample": True, "temperature": 0.7}]
    recipe = write_recipe(tmp_path, recipe_with(decode__backend="vllm", decode__searches=searches))
    assert cli.main(["run", str(recipe), "--run_dir", str(tmp_path / "run")]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
