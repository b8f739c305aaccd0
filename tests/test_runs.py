from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import yaml

from convexlm.errors import UserError
from convexlm.recipe import Recipe, load_recipe
from convexlm.runs import RunFolder, TrainedRun, identity_sha256, read_done, trained_runs, versions
from pipeline_helpers import recipe_with, write_recipe


def load(tmp_path: Path, **changes: Any) -> Recipe:
    return load_recipe(write_recipe(tmp_path, recipe_with(**changes)))


def test_claiming_writes_the_resolved_recipe_with_versions(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    folder = RunFolder(tmp_path / "a" / "b")
    assert folder.check(recipe) is False and not folder.path.exists()
    folder.claim(recipe)
    kept = yaml.safe_load(folder.recipe.read_text())
    assert kept.pop("versions") == versions() and versions()["convexlm"]
    assert kept == recipe.resolved
    assert [path.name for path in folder.path.iterdir()] == ["recipe.yaml"]


def test_the_same_recipe_may_claim_again_and_nothing_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path))
    before = folder.recipe.stat().st_mtime_ns
    folder.claim(load(tmp_path))
    folder.claim(load(tmp_path, description="other words", vars={"unused": "x"}))
    assert folder.check(load(tmp_path)) is True
    assert folder.recipe.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__max_steps": 7}, "`train.max_steps` is 6 there and 7 here"),
        ({"seeds": [1]}, "`seeds` is [1, 2] there and [1] here"),
        ({"arms__convex__k": 2.0}, "`arms.convex.k` is 1.0 there and 2.0 here"),
        ({"seeds": [1, 3]}, "`seeds` is [1, 2] there and [1, 3] here"),
        ({"arms__convex": None}, "`arms.convex` is {'objective'"),
        ({"arms__new": {"objective": "dft"}, "seeds": [1, 2, 3], "arms__convex__k": 2.0}, "`arms.convex.k` is 1.0"),
        ({"data__dataset": "f" * 100 + ".json"}, "..."),
        ({"name": "other"}, "`name` is 'tiny' there and 'other' here"),
        ({"data__dataset__size": 100}, "`data.dataset.size` is 200 there and 100 here"),
    ],
)
def test_another_recipe_is_refused_with_the_first_difference(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path))
    mark_as_trained(folder, "convex.seed1")
    before = folder.recipe.read_bytes()
    other = load(tmp_path, **changes)
    for claim in (folder.check, folder.claim):
        with pytest.raises(UserError) as error:
            claim(other)
        assert "belongs to another recipe" in str(error.value) and said in str(error.value)
        assert str(folder.path) in str(error.value)
    assert folder.recipe.read_bytes() == before
    assert identity_sha256(other) != identity_sha256(load(tmp_path))


def mark_as_trained(folder: RunFolder, run: str) -> None:
    (folder.path / "train" / run).mkdir(parents=True)
    (folder.path / "train" / run / "done.json").write_text("{}")


def test_an_arm_of_which_nothing_is_trained_may_be_mended_or_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path))
    for run in ("base.seed1", "mle.seed1", "convex.seed2"):
        mark_as_trained(folder, run)
    folder.claim(load(tmp_path, arms__new={"objective": "convex", "k": 2.0, "learning_rate": 1e30}))
    (folder.path / "train" / "new.seed1").mkdir()  # it was begun, and left no checkpoint
    mended = load(tmp_path, arms__new={"objective": "convex", "k": 2.0, "learning_rate": 0.01})
    assert folder.check(mended) is False
    folder.claim(mended)
    assert yaml.safe_load(folder.recipe.read_text())["arms"]["new"]["learning_rate"] == 0.01
    folder.claim(load(tmp_path))
    assert "new" not in yaml.safe_load(folder.recipe.read_text())["arms"]
    folder.claim(mended)
    (folder.path / "train" / "new.seed1" / "checkpoint-3").mkdir()
    for other in (load(tmp_path), load(tmp_path, arms__new={"objective": "dft"})):
        with pytest.raises(UserError, match="belongs to another recipe: `arms.new"):
            folder.check(other)


def test_what_a_killed_call_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    names = ("data/.train.jsonl.x1.tmp", "train/mle/.done.json.x2.tmp", ".comparison.json.x3.tmp")
    kept = ("data/train.jsonl", "data/mine.tmp", ".report.html.x4.tmp", "train/mle/checkpoint-3/.x.tmp")
    for name in (*names, *kept):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).touch()
    with folder.lock():
        assert not any((folder.path / name).exists() for name in names)
        assert all((folder.path / name).exists() for name in kept)


def test_the_decoding_may_be_another_until_something_is_decoded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path))
    mark_as_trained(folder, "base.seed1")
    other = load(tmp_path, decode__searches=[{"num_beams": 4, "max_new_tokens": 8}])
    assert folder.check(other) is False
    folder.claim(other)
    assert folder.check(other) is True
    (folder.path / "decode" / "mle.seed1" / "checkpoint-3").mkdir(parents=True)
    (folder.path / "decode" / "mle.seed1" / "checkpoint-3" / "toy.en-de.beam4.jsonl.part").touch()
    with pytest.raises(UserError, match="belongs to another recipe: `decode.searches"):
        folder.check(load(tmp_path))


def test_a_run_goes_on_with_another_number_of_decoding_processes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path, decode__num_processes=4))
    before = folder.recipe.read_bytes()
    for number in (None, 1, 2):
        other = load(tmp_path, decode__num_processes=number)
        assert folder.check(other)
        folder.claim(other)
        assert identity_sha256(other) == identity_sha256(load(tmp_path))
    assert folder.check(load(tmp_path, decode__gpu_memory_utilization=0.5)), "as much as there is room for now"
    assert folder.recipe.read_bytes() == before


def test_a_recipe_with_more_seeds_and_arms_goes_on_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(load(tmp_path, seeds=[7]))
    kept = yaml.safe_load(folder.recipe.read_text())
    folder.recipe.write_text(yaml.safe_dump({**kept, "versions": {"convexlm": "0.0"}}, sort_keys=False))
    more = load(tmp_path, seeds=[3, 7], arms__new={"objective": "dft"})
    before = folder.recipe.read_bytes()
    assert folder.check(more) is False and folder.recipe.read_bytes() == before
    # The runs of the seed that it began with keep their names.
    named = {(run.arm, run.seed): run.name for run in trained_runs(folder.continued(more))}
    assert named["mle", 7] == "mle" and named["mle", 3] == "mle.seed3" and named["new", 7] == "new"
    folder.claim(more)
    assert folder.check(more) is True
    kept = yaml.safe_load(folder.recipe.read_text())
    assert kept["plain_seed"] == 7 and kept["seeds"] == [3, 7] and kept["versions"] == {"convexlm": "0.0"}
    still_more = load(tmp_path, seeds=[3, 7, 8], arms__new={"objective": "dft"})
    folder.claim(still_more)
    assert {(r.arm, r.seed): r.name for r in trained_runs(folder.continued(still_more))}["mle", 7] == "mle"
    with pytest.raises(UserError, match=r"`seeds` is \[3, 7, 8\] there and \[7\] here"):
        folder.check(load(tmp_path, seeds=[7], arms__new={"objective": "dft"}))


def test_numbers_survive_the_recipe_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, train__learning_rate=1e-5, train__weight_decay=3e20, train__max_grad_norm=1e-320)
    folder = RunFolder(tmp_path / "run")
    folder.claim(recipe)
    assert folder.check(recipe)


def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "thesis")
    folder.path.mkdir()
    (folder.path / "chapter1.tex").write_text("important")
    with pytest.raises(UserError, match=r"holds files but no recipe\.yaml"):
        folder.claim(load(tmp_path))
    assert [path.name for path in folder.path.iterdir()] == ["chapter1.tex"]


def test_what_a_kill_at_the_very_start_leaves_is_no_foreign_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    (folder.path / ".recipe.yaml.abc123.tmp").write_text("name: ti")
    folder.claim(load(tmp_path))
    assert folder.check(load(tmp_path))


@pytest.mark.parametrize("content", ["", "- a list\n", "name: [", "\x00"])
def test_a_recipe_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.recipe.write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        folder.claim(load(tmp_path))
    assert folder.recipe.read_text() == content


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("not a folder")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(path).claim(load(tmp_path))
    for at in (path, path / "below"):
        with pytest.raises(UserError, match="cannot be used as a run folder"), RunFolder(at).lock():
            pass
    assert path.read_text() == "not a folder"


def _try_lock(path: Path, answers: Any) -> None:
    try:
        with RunFolder(path).lock():
            answers.put("locked")
    except UserError as error:
        answers.put(str(error))


def ask_another_process(path: Path) -> str:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_try_lock, args=(path, answers))
    process.start()
    answer = answers.get(timeout=30)
    process.join()
    return answer


def test_a_second_process_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        assert "another `convexlm run` is at work here" in ask_another_process(folder.path)
    assert ask_another_process(folder.path) == "locked"
    with folder.lock():  # and it can be taken again
        pass


def test_a_lock_is_given_back_after_a_failure(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RuntimeError), folder.lock():
        raise RuntimeError
    assert ask_another_process(folder.path) == "locked"


def test_every_arm_is_trained_with_every_seed_its_start_before_it(tmp_path: Path) -> None:
    runs = trained_runs(load(tmp_path))
    assert [run.name for run in runs] == [f"{arm}.seed{seed}" for seed in (1, 2) for arm in ("base", "mle", "convex")]
    assert runs[4] == TrainedRun("mle", 2, "mle.seed2")
    assert [run.name for run in trained_runs(load(tmp_path, seeds=[9]))] == ["base", "mle", "convex"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "done.json, line 1: not valid JSON"),
        ("[]", "done.json: expected a JSON object"),
        ('{"checkpoints": []}', "done.json: does not say which `checkpoints` there are"),
        ('{"checkpoints": [4]}', "done.json: does not say which `checkpoints` there are"),
    ],
)
def test_a_damaged_note_of_a_training_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_done(tmp_path)
    assert said in str(error.value) and "; delete it, and" in str(error.value) and "\n" not in str(error.value)


def test_the_current_folder_as_run_folder_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder(Path()) == RunFolder(tmp_path) != RunFolder(Path("below"))


def test_paths_are_those_of_the_design(tmp_path: Path) -> None:
    folder, run = RunFolder(Path("runs/x")), TrainedRun("mle", 1, "mle")
    assert folder.train(run) == Path("runs/x/train/mle")
    assert folder.decode(run, "checkpoint-200", "wmt22", "en-de", "beam4") == Path(
        "runs/x/decode/mle/checkpoint-200/wmt22.en-de.beam4.jsonl"
    )
    assert (folder.scores, folder.report) == (Path("runs/x/scores.jsonl"), Path("runs/x/report.html"))
    assert json.loads(json.dumps(versions())) == versions()
