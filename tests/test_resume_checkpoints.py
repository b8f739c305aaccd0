"""A run goes on from the newest good checkpoint of the same training, and never loses the last good one."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
import torch

from convexlm import checkpoints, cli, durable
from convexlm.checkpoints import (
    COMPLETE_FILE,
    INVENTORY_FILE,
    SAVING_FILE,
    complete_checkpoints,
    is_half_written_here,
    remove_checkpoint,
    why_incomplete,
)
from convexlm.metrics_file import read_metrics
from resume_helpers import Payload, assert_same_run, given, write_files
from training_helpers import train, words, write_records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(folder, **given(files)) == 0
    return folder


@pytest.fixture
def copied(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def test_a_log_between_two_saves_is_whole_after_resuming(files, undisturbed, copied):
    """Steps 3 and 6 are logged and step 4 is saved: it counts in the log at 6."""
    shutil.rmtree(copied / "checkpoint-8")
    assert train(copied, "--resume", **given(files)) == 0
    assert_same_run(copied, undisturbed)
    assert [line["step"] for line in read_metrics(copied)] == [3, 6]


@pytest.mark.parametrize("lora", [False, True])
def test_others_of_a_group_can_read_a_checkpoint(files, undisturbed, tmp_path, lora):
    """As the `umask` says; safetensors leaves its files to their owner alone."""
    options = given(files, max_steps=1, save_steps=1)
    if lora:
        del options["config_name"]
        options |= {"model_name_or_path": undisturbed / "checkpoint-8", "use_peft": True}
        options["lora_target_modules"] = "all-linear"
    before = os.umask(0o027)
    try:
        assert train(tmp_path / "run", **options) == 0
    finally:
        os.umask(before)
    saved = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == f"{'adapter_' if lora else ''}model.safetensors" for path in saved)
    assert {path.name for path in saved if stat.S_IMODE(path.stat().st_mode) != 0o640} == set()


# -- checkpoints that are none


def spoil_nothing_but_the_marker(folder):
    (folder / COMPLETE_FILE).rename(folder / SAVING_FILE)
    (folder / "model-00002-of-00002.safetensors").write_text("of another run")


def spoil_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_optimizer(folder):
    (folder / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_nothing_but_the_marker, "checkpoint-8: not written to the end (the run was stopped while saving); rem"),
        (spoil_weights, "bytes, "),
        (spoil_optimizer, "checkpoint-8: optimizer.pt is missing; passed over"),
    ],
    ids=["marker", "weights", "optimizer"],
)  # fmt: skip
def test_a_broken_checkpoint_is_named_and_passed_over(files, undisturbed, copied, capfd, spoil, said):
    spoil(copied / "checkpoint-8")
    assert train(copied, "--resume", **given(files)) == 0
    err = capfd.readouterr().err
    assert said in err and "going on from checkpoint-4" in err
    assert_same_run(copied, undisturbed)
    names = {path.name for path in (undisturbed / "checkpoint-8").iterdir()}
    assert {path.name for path in (copied / "checkpoint-8").iterdir()} == names


def test_what_others_left_is_passed_over_and_not_deleted(files, tmp_path, capfd):
    theirs = tmp_path / "run" / "checkpoint-100"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("somebody's")
    assert train(tmp_path / "run", "--resume", **given(files, max_steps=2, save_steps=2)) == 0
    assert "passed over" in capfd.readouterr().err
    assert (theirs / "model.safetensors").read_text() == "somebody's"


def test_without_the_optimizer_training_begins_again(files, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    options = given(files, save_only_model=True)
    assert train(run, **options) == 0
    assert not (run / "checkpoint-4" / "optimizer.pt").exists()
    assert train(run, "--resume", **options) == 0  # it was done: nothing to go on with
    shutil.rmtree(run / "checkpoint-8")
    capfd.readouterr()
    assert train(run, "--resume", **options) == 0
    assert "checkpoint-4: has no optimizer state (save_only_model)" in capfd.readouterr().err
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_run(files, copied, tmp_path, capfd, name):
    shutil.rmtree(copied / "checkpoint-8")
    inventory = copied / "checkpoint-4" / INVENTORY_FILE
    content = json.loads(inventory.read_text())
    torch.save({"state": Payload(tmp_path / "executed")}, copied / "checkpoint-4" / name)
    content["files"][name] = (copied / "checkpoint-4" / name).stat().st_size
    inventory.write_text(json.dumps(content))
    assert train(copied, "--resume", **given(files)) == 2
    assert not (tmp_path / "executed").exists()
    err = capfd.readouterr().err
    assert "checkpoint-4" in err and "Traceback" not in err


# -- what is deleted, and what stays


class PowerCutError(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


@pytest.mark.parametrize("moment", ["sync_tree", "rotate", "remove_checkpoint"])
def test_rotation_never_takes_the_last_good_checkpoint(files, undisturbed, tmp_path, monkeypatch, moment):
    """Stopped before the new one is whole, before the old one goes, and while it goes."""
    run, options = tmp_path / "run", given(files, save_total_limit=1)
    module = durable if moment == "rotate" else checkpoints
    real = getattr(module, moment)

    def cut(path, *rest):
        if moment == "remove_checkpoint":
            (path / COMPLETE_FILE).replace(path / SAVING_FILE)
        if (run / "checkpoint-8").exists():
            raise PowerCutError
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, cut)
        with pytest.raises(PowerCutError):
            train(run, **options)
    good = [path.name for path in complete_checkpoints(run)]
    assert (
        good
        == {
            "sync_tree": ["checkpoint-4"],
            "rotate": ["checkpoint-4", "checkpoint-8"],
            "remove_checkpoint": ["checkpoint-8"],
        }[moment]
    )
    assert train(run, "--resume", **options) == 0
    assert_same_run(run, undisturbed)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_checkpoint_that_is_half_deleted_is_known_as_ours(tmp_path, monkeypatch):
    """Stopped at each call that deletes: it is none, and the next run may delete the rest."""

    def saved(folder):
        (folder / "inner").mkdir(parents=True)
        names = ("a.bin", "config.json", COMPLETE_FILE, INVENTORY_FILE, "model.safetensors", "inner/shard", ".hidden")
        for name in names:
            (folder / name).write_text("x")

    stops = 0
    for number in range(1, 40):
        folder, left = tmp_path / f"checkpoint-{number}", [number]
        saved(folder)

        def fatal(function, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise PowerCutError
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, fatal(getattr(os, name)))
            try:
                remove_checkpoint(folder)
            except PowerCutError:
                stops += 1
        if folder.exists():
            assert why_incomplete(folder) and is_half_written_here(folder), number
            remove_checkpoint(folder)
        assert not folder.exists()
    assert 8 <= stops < 39


def test_the_best_checkpoint_stays(files, tmp_path):
    options = given(files, eval_dataset=files / "eval.jsonl", eval_strategy="steps", eval_steps=2, save_steps=2,
                    save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="loss", max_steps=8,
                    greater_is_better=True, learning_rate=0.01)  # fmt: skip
    assert train(tmp_path / "run", **options) == 0
    evaluated = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    best = max(evaluated, key=lambda step: evaluated[step])
    names = {path.name for path in complete_checkpoints(tmp_path / "run")}
    assert names == {f"checkpoint-{best}", "checkpoint-8"} or (best == 8 and len(names) == 2)


def test_a_limit_of_one_keeps_the_newest_beside_the_best(files, tmp_path):
    """transformers would delete the newest at the end; what is compared at the last step, or gone on from, is that."""
    options = given(files, eval_dataset=files / "eval.jsonl", eval_strategy="steps", eval_steps=2, save_steps=2,
                    save_total_limit=1, metric_for_best_model="nll", learning_rate=0.5)  # fmt: skip
    assert train(tmp_path / "run", **options) == 0
    evaluated = {line["step"]: line["eval_nll"] for line in read_metrics(tmp_path / "run") if "eval_nll" in line}
    best = min(evaluated, key=lambda step: evaluated[step])
    kept = [path.name for path in complete_checkpoints(tmp_path / "run")]
    assert best != 8 and kept == [f"checkpoint-{best}", "checkpoint-8"]
    assert torch.load(tmp_path / "run/checkpoint-8/training_args.bin", weights_only=False).save_total_limit == 1


def test_the_best_checkpoint_by_nll_has_the_smallest_and_is_what_to_decode(files, tmp_path, capfd):
    options = given(files, eval_dataset=files / "eval.jsonl", eval_strategy="steps", eval_steps=2, save_steps=2,
                    load_best_model_at_end=True, metric_for_best_model="nll", max_steps=8,
                    learning_rate=0.5)  # fmt: skip
    assert train(tmp_path / "run", "--json", **options) == 0
    evaluated = {line["step"]: line["eval_nll"] for line in read_metrics(tmp_path / "run") if "eval_nll" in line}
    best = str(tmp_path / "run" / f"checkpoint-{min(evaluated, key=lambda step: evaluated[step])}")
    assert json.loads(capfd.readouterr().out)["best_checkpoint"] == best
    assert not best.endswith("-8")
    assert train(tmp_path / "run", "--resume", **options) == 0
    assert f"--model_name_or_path {best} " in capfd.readouterr().out.replace("\n", " ")


def test_a_folder_with_checkpoints_is_not_overwritten(files, copied, capfd):
    assert cli.main(["train", *words(**given(files), output_dir=copied)]) == 2
    assert "--resume" in capfd.readouterr().err


# -- another training in the same folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "mle"}, "the objective was convex, not mle"),
        ({"objective": "dft"}, "level was sequence, not token"),
        ({"k": 3.0}, "k was 1.0, not 3.0"),
        ({"k_warmup": 0.5}, "k_warmup was 0.0, not 0.5"),
        ({"add_bos": False}, "add_bos was True, not False"),
        ({"max_length": 40}, "max_length was 48, not 40"),
        ({"max_records": 20}, "max_records was unset, not 20"),
        ({"dataset": "eval.jsonl"}, "the data was data.jsonl, not eval.jsonl"),
        ({"dataset": "other/data.jsonl"}, "the data was an earlier data.jsonl, not as it is now"),
    ],
    ids=str,
)
def test_another_training_does_not_go_on_in_the_same_folder(files, copied, capfd, changes, said):
    """Neither with steps left nor without."""
    (files / "other").mkdir(exist_ok=True)
    write_records(files / "other" / "data.jsonl", 25, seed=1)
    if "dataset" in changes:
        changes = {"dataset": files / changes["dataset"]}
    before = sorted(path.name for path in copied.iterdir())
    for steps in (8, 12):
        assert train(copied, "--resume", **given(files, max_steps=steps, **changes)) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert said in line and "another --output_dir" in line
    assert sorted(path.name for path in copied.iterdir()) == before


def test_data_that_have_only_moved_go_on_and_older_markers_are_not_asked(files, undisturbed, copied, tmp_path):
    shutil.rmtree(copied / "checkpoint-8")
    shutil.copyfile(files / "data.jsonl", tmp_path / "data.jsonl")
    assert train(copied, "--resume", **given(files, dataset=tmp_path / "data.jsonl")) == 0
    assert_same_run(copied, undisturbed)
    shutil.rmtree(copied / "checkpoint-8")
    marker = json.loads((copied / "checkpoint-4" / COMPLETE_FILE).read_text())
    del marker["training"]
    (copied / "checkpoint-4" / COMPLETE_FILE).write_text(json.dumps(marker))
    assert train(copied, "--resume", **given(files, max_records=20)) == 0


def test_when_no_step_is_left_that_is_said(files, copied, capfd):
    assert train(copied, "--resume", **given(files)) == 0
    told = capfd.readouterr()
    assert "nothing to do" in told.out and "nothing to do" in told.err and "trained 8 steps" not in told.out
    shutil.rmtree(copied / "checkpoint-8")
    assert train(copied, "--resume", **given(files)) == 0
    assert "trained the last 4 of 8 steps" in capfd.readouterr().out
