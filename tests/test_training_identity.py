"""What a training was made from is compared whenever its folder is gone on with; nothing is trained here."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from convexlm import pipeline
from convexlm.errors import UserError
from convexlm.launch.settings import LaunchSettings
from convexlm.recipe import Recipe, load_recipe
from convexlm.runs import RunFolder, trained_runs
from convexlm.training_identity import IDENTITY_FILE, InputHashes
from pipeline_helpers import recipe_with, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable


class Home:
    """Files that a recipe of two arms names, its run folder, and a training that only leaves a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, RunFolder(path / "run")
        self.base, self.tokenizer, self.data = path / "base", path / "tokenizer", path / "data"
        for folder in (self.base, self.tokenizer, self.data):
            folder.mkdir()
        (self.base / "config.json").write_text("{}")
        (self.base / "model.safetensors").write_bytes(b"weights")
        (self.tokenizer / "tokenizer.json").write_text("{}")
        (self.data / "part1.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
        self.plugin = path / "mine.py"
        self.plugin.write_text("A = 1\n")
        self.trained: list[str] = []
        self.meanwhile: Callable[[str], Any] = lambda name: None  # what happens while a run is trained

    def recipe(self, **changes: Any) -> Recipe:
        small: dict[str, Any] = {
            "seeds": [1],
            "model": {"model_name_or_path": str(self.base), "tokenizer": str(self.tokenizer)},
            "data__dataset": str(self.data),
            "plugins": [str(self.plugin)],
            "arms": {"mle": {"objective": "mle"}, "convex": {"objective": "convex", "init_from": "mle"}},
        }
        return load_recipe(write_recipe(self.path, recipe_with(**{**small, **changes})))

    def train(self, recipe: Recipe, *, interrupted: bool = False) -> list[str]:
        """The training stage; returns the names of what was trained."""
        before, hashes = len(self.trained), InputHashes()
        runs, train = trained_runs(recipe), partial(self._train, interrupted=interrupted)
        pipeline._check_all_begun(recipe, self.folder, runs, hashes)
        for run in runs:
            pipeline._train(recipe, self.folder, run, run.name, train, hashes)
        return self.trained[before:]

    def _train(self, options: dict[str, Any], name: str, *, interrupted: bool = False) -> dict[str, Any]:
        checkpoint = self.folder.path / "train" / name / "checkpoint-3"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "config.json").write_text("{}")
        (checkpoint / "model.safetensors").write_bytes(name.encode())
        self.trained.append(name)
        self.meanwhile(name)
        if interrupted:
            raise KeyboardInterrupt
        rest = {"steps": 3, "records": 1, "dropped": [], "truncated": 0, "seconds": 1.0}
        return {"checkpoints": ["checkpoint-3"], **rest}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Home(tmp_path)


CHANGES = {
    "model": (
        lambda home: (home.base / "model.safetensors").write_bytes(b"WEIGHTS"),
        "from another model: {base} has",
    ),
    "tokenizer": (
        lambda home: (home.tokenizer / "tokenizer.json").write_text("[]"),
        "another tokenizer: {tokenizer} h",
    ),
    "data": (lambda home: (home.data / "part2.jsonl").write_text("{}\n"), "on other data: {data} has changed since"),
    "plugin": (lambda home: home.plugin.write_text("A = 2\n"), "with another plugin: {plugin} has changed since"),
}


@pytest.mark.parametrize("interrupted", [False, True], ids=["done", "interrupted"])
@pytest.mark.parametrize("what", CHANGES)
def test_an_input_that_has_changed_is_named_and_nothing_is_trained(home: Home, what: str, interrupted: bool) -> None:
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            home.train(home.recipe(), interrupted=True)
    else:
        assert home.train(home.recipe()) == ["mle", "convex"]
    change, said = CHANGES[what]
    change(home)
    trained = list(home.trained)
    with pytest.raises(UserError) as error:
        home.train(home.recipe(arms={"mle": {"objective": "mle"}, "dft": {"objective": "dft"}}))
    assert said.format(**vars(home)) in str(error.value) and "\n" not in str(error.value)
    assert "train/mle:" in str(error.value) and home.trained == trained


def test_what_has_not_changed_goes_on_also_in_a_moved_folder(home: Home) -> None:
    with pytest.raises(KeyboardInterrupt):
        home.train(home.recipe(), interrupted=True)
    identity = home.folder.path / "train" / "mle" / IDENTITY_FILE
    before = identity.stat().st_mtime_ns
    assert home.train(home.recipe()) == ["mle", "convex"] and identity.stat().st_mtime_ns == before
    home.folder.path.rename(home.path / "moved")
    home.folder = RunFolder(home.path / "moved")
    assert home.train(home.recipe()) == []


def test_the_current_folder_is_the_same_run_folder(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.train(home.recipe())
    monkeypatch.chdir(home.folder.path)
    home.folder = RunFolder(Path())
    assert home.train(home.recipe()) == []
    more = {**home.recipe().resolved["arms"], "dft": {"objective": "dft", "init_from": "mle"}}
    assert home.train(home.recipe(arms=more)) == ["dft"]
    monkeypatch.chdir(home.path)
    home.folder = RunFolder(Path("run"))
    assert home.train(home.recipe(arms=more)) == []


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_changes_while_an_arm_is_trained_stops_the_others(home: Home, what: str) -> None:
    """Arms of one folder start from the same files, so the next is not trained from another."""
    change, said = CHANGES[what]
    home.meanwhile = lambda name: change(home)
    arms = {"mle": {"objective": "mle"}, "dft": {"objective": "dft"}}
    with pytest.raises(UserError) as error:
        home.train(home.recipe(arms=arms))
    assert said.format(**vars(home)) in str(error.value) and "train/mle:" in str(error.value)
    assert home.trained == ["mle"]


def test_a_file_that_changes_while_the_last_arm_is_trained_stops_before_it_is_scored(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(*given: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(pipeline, "_trainer", lambda recipe: nullcontext(home._train))
    monkeypatch.setattr(pipeline, "decode_stage", stage)
    file = home.data / "part1.jsonl"
    home.meanwhile = lambda name: name == "convex" and file.write_text('{"instruction": "c", "output": "d"}\n')
    recipe = home.recipe(data__dataset=str(file), decode__checkpoints="last")
    with pytest.raises(UserError, match="train/mle: trained on other data: .*part1.jsonl has changed since"):
        pipeline.run_recipe(recipe, home.folder.path)
    assert home.trained == ["mle", "convex"]


def test_damaged_files_of_a_training_are_one_line(home: Home) -> None:
    home.train(home.recipe())
    for name, content, said in (
        (IDENTITY_FILE, "[]", "expected a JSON object; put it back, or delete the folder"),
        (IDENTITY_FILE, '{"inputs": []}', "its `inputs` is no JSON object; put it back"),
        ("done.json", "{", "not valid JSON .*; delete it, and the training is taken up"),
    ):
        path = home.folder.path / "train" / "mle" / name
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            home.train(home.recipe())
        path.write_text(before)
    assert home.train(home.recipe()) == []


def test_a_refused_recipe_leaves_the_folders_own(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_trainer", lambda recipe: nullcontext(home._train))
    for stage in ("decode_stage", "_report"):
        monkeypatch.setattr(pipeline, stage, lambda *given: None)
    monkeypatch.setattr("convexlm.evaluation.evaluate", lambda *given: {})
    small = {"data__dataset": str(home.data / "part1.jsonl"), "decode__checkpoints": "last"}
    pipeline.run_recipe(home.recipe(**small), home.folder.path)
    assert home.trained == ["mle", "convex"]
    before = home.folder.recipe.read_bytes()
    CHANGES["model"][0](home)
    more = {**home.recipe().resolved["arms"], "dft": {"objective": "dft"}}
    with pytest.raises(UserError, match="trained from another model"):
        pipeline.run_recipe(home.recipe(**small, arms=more), home.folder.path)
    assert home.folder.recipe.read_bytes() == before and home.trained == ["mle", "convex"]


def test_the_start_of_an_arm_counts_by_its_weights(home: Home) -> None:
    home.train(home.recipe())
    (home.folder.path / "train/mle/checkpoint-3/model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"train/convex: trained from another model: .*mle/checkpoint-3 has changed"):
        home.train(home.recipe())


def test_before_the_first_checkpoint_the_files_may_be_mended(home: Home) -> None:
    with pytest.raises(KeyboardInterrupt):
        home.train(home.recipe(), interrupted=True)
    (home.folder.path / "train/mle/checkpoint-3").rename(home.path / "lost")
    CHANGES["data"][0](home)
    assert home.train(home.recipe()) == ["mle", "convex"]


def test_folders_without_an_identity_file_go_on_by_what_they_know(home: Home) -> None:
    file = home.data / "part1.jsonl"
    home.train(home.recipe(data__dataset=str(file)))
    for path in home.folder.path.glob(f"train/*/{IDENTITY_FILE}"):
        path.unlink()
    CHANGES["model"][0](home)
    assert home.train(home.recipe(data__dataset=str(file))) == []
    assert not list(home.folder.path.glob(f"train/*/{IDENTITY_FILE}"))
    file.write_text("{}\n")
    with pytest.raises(UserError, match="trained on other data or from another model"):
        home.train(home.recipe(data__dataset=str(file)))


def test_another_global_batch_is_refused_where_there_is_still_to_train(home: Home) -> None:
    def on(processes: int, recipe: Recipe) -> Recipe:
        return replace(recipe, launch=LaunchSettings(num_processes=processes))

    home.train(on(2, home.recipe()))
    assert home.train(on(1, home.recipe())) == []  # to decode it elsewhere
    more = {**home.recipe().resolved["arms"], "dft": {"objective": "dft"}}
    with pytest.raises(UserError, match=r"train/mle: trained with a global batch of 16, here it is 8; start with"):
        home.train(on(1, home.recipe(arms=more)))
    assert home.train(on(2, home.recipe(arms=more))) == ["dft"]


def test_a_kept_global_batch_may_be_shared_by_any_number(home: Home) -> None:
    recipe = home.recipe(train__global_batch_size=16)
    with pytest.raises(KeyboardInterrupt):
        home.train(replace(recipe, launch=LaunchSettings(num_processes=2)), interrupted=True)
    assert home.train(recipe) == ["mle", "convex"]
    assert json.loads((home.folder.path / "train/mle" / IDENTITY_FILE).read_text())["global_batch"] == 16


def test_a_large_model_is_hashed_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    import convexlm.decoding.checkpoint as checkpoint

    hashed: list[str] = []
    real = checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    arms = {name: {"objective": name} for name in ("mle", "convex", "dft")}
    home.train(home.recipe(arms=arms))
    assert hashed.count("model.safetensors") == 1


def test_processes_of_a_launch_get_the_plugins(home: Home) -> None:
    recipe = home.recipe()
    options = pipeline.train_options(recipe, home.folder, trained_runs(recipe)[0])
    assert options["plugins"] == [str(home.plugin)]
