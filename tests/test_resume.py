"""A run that is killed at any moment goes on as if it had not been, and never loses its last good checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

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
from convexlm.sampling import EpochLengthGroupedSampler, SamplingOrder, note_fillers, set_epoch
from trainer_helpers import assert_same_weights, make, trained
from training_helpers import Run, environment, rows, tiny_model, train, words, write_model_files, write_records


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with dropout, whose training depends on the random state, and data."""
    folder = tmp_path_factory.mktemp("files")
    write_model_files(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    write_records(folder / "data.jsonl", 25, weights=True)
    write_records(folder / "eval.jsonl", 3, seed=5)
    return folder


def given(files, **settings):
    made = {
        "config_name": files / "model",
        "tokenizer_name": files / "model",
        "dataset": files / "data.jsonl",
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 3,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
    }
    return {**made, **settings}


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(folder, **given(files)) == 0
    return folder


@pytest.fixture
def copied(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def metrics(folder):
    return [
        {key: value for key, value in line.items() if not key.endswith(("_runtime", "_per_second"))}
        for line in read_metrics(folder)
    ]


def assert_same_run(got, wanted, step=8):
    assert metrics(got) == metrics(wanted)
    theirs = Run(wanted, step).weights
    for name, value in Run(got, step).weights.items():
        assert torch.equal(value, theirs[name]), name


# -- kill -9


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(files, tmp_path):
    """At random moments of 60 steps with dropout, accumulation, evaluation and rotation, and while saving."""
    options = words(
        config_name=files / "model",
        tokenizer_name=files / "model",
        dataset=files / "data.jsonl",
        eval_dataset=files / "eval.jsonl",
    )
    script = Path(__file__).with_name("killing.py")
    made = {**environment(), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, script, tmp_path, "20", "1", *options], env=made, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    wanted = result["wanted"]
    assert result["killed"] == 20 and result["rounds"]
    assert result["lost"] == []  # (newest complete checkpoint before, after) wherever one had gone
    assert wanted["folders"] == ["checkpoint-50", "checkpoint-60"] == sorted(wanted["weights"])
    steps = [line["step"] for line in wanted["metrics"] if "loss" in line]
    assert steps == list(range(3, 61, 3))
    for number, one in enumerate(result["rounds"]):
        assert one == wanted, number
    assert "going on from checkpoint-" in result["log"] and "not written to the end" in result["log"]
    assert "Traceback" not in result["log"]


def test_a_log_between_two_saves_is_whole_after_resuming(files, undisturbed, copied):
    """Steps 3 and 6 are logged and step 4 is saved: it counts in the log at 6."""
    shutil.rmtree(copied / "checkpoint-8")
    assert train(copied, "--resume", **given(files)) == 0
    assert_same_run(copied, undisturbed)
    assert [line["step"] for line in read_metrics(copied)] == [3, 6]


def test_what_belongs_to_the_end_of_an_epoch_is_not_lost(files, tmp_path, monkeypatch):
    """Saved at the last step of an epoch, and stopped before the epoch's own log and evaluation."""
    options = given(files, eval_dataset=files / "eval.jsonl", eval_strategy="epoch", logging_strategy="epoch",
                    max_steps=14, save_steps=7)  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, **options) == 0
    assert [line["step"] for line in read_metrics(whole)] == [7, 7, 14, 14]
    from convexlm.trainer import ConvexTrainer

    class PowerCutError(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(ConvexTrainer, "evaluate", lambda self, *a, **k: (_ for _ in ()).throw(PowerCutError))
        with pytest.raises(PowerCutError):
            train(broken, **options)
    assert complete_checkpoints(broken) == []
    assert train(broken, "--resume", **options) == 0
    assert_same_run(broken, whole, step=14)


def test_evaluation_on_start_is_not_done_twice(files, tmp_path):
    options = given(files, eval_dataset=files / "eval.jsonl", eval_on_start=True)
    assert train(tmp_path / "run", **options) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    assert train(tmp_path / "run", "--resume", **options) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 3, 6]


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


# -- the order of the data


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "data_seed": 5}], ids=str)
def test_grouping_by_length_goes_on_in_the_same_order(files, tmp_path, settings):
    """The second of three epochs is interrupted in its middle; 25 records make 7 batches an epoch."""
    options = given(files, train_sampling_strategy="group_by_length", logging_steps=1, save_steps=1, **settings)
    steps = 18 // settings.get("gradient_accumulation_steps", 1)
    assert train(tmp_path / "whole", **{**options, "max_steps": steps}) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in range(steps * 5 // 9 + 1, steps + 1):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    assert train(tmp_path / "run", "--resume", **{**options, "max_steps": steps}) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", steps)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_process_that_skips_batches_has_the_order_of_its_epoch(grouped):
    """Of two processes, the first goes on within the second epoch."""

    def loader():
        sampler = EpochLengthGroupedSampler(4, [n % 5 for n in range(40)], 1) if grouped else RandomSampler(range(40))
        plain = DataLoader(range(40), batch_size=2, sampler=sampler)
        return prepare_data_loader(plain, num_processes=2, process_index=0, use_seedable_sampler=True, data_seed=1,
                                   put_on_device=False)  # fmt: skip

    epochs = []
    for epoch in range(2):
        whole = loader()
        whole.set_epoch(epoch)  # as the Trainer does
        epochs.append([batch.tolist() for batch in whole])
    assert epochs[0] != epochs[1]
    resumed = skip_first_batches(loader(), 3)
    resumed.set_epoch(1)
    set_epoch(resumed, 1)
    assert [batch.tolist() for batch in resumed] == epochs[1][3:]


def test_a_rebalanced_epoch_that_is_gone_on_with_has_its_own_order():
    """Of two processes, the first; transformers' own call does not reach the sampler where batches are skipped."""

    def loader():
        sampler = BatchRebalanceSampler([5 + n % 7 for n in range(40)], 8, 2, 2, rank=0, drop_last=False)
        made = prepare_data_loader(DataLoader(range(40), batch_sampler=sampler), num_processes=2, process_index=0,
                                   even_batches=False, put_on_device=False)  # fmt: skip
        made.batch_sampler.num_processes = 1  # as the Trainer does
        return made

    epochs = []
    for epoch in range(2):
        whole = loader()
        set_epoch(whole, epoch)
        epochs.append([batch.tolist() for batch in whole])
    assert epochs[0] != epochs[1]
    resumed = skip_first_batches(loader(), 3)
    set_epoch(resumed, 1)
    assert [batch.tolist() for batch in resumed] == epochs[1][3:]


def test_a_rebalanced_step_is_the_same_however_it_is_split(files, tmp_path):
    """25 records in steps of 8: eight micro-batches of the fourth step share one record."""
    options = given(files, train_sampling_strategy="batch_rebalance", logging_steps=1, save_steps=8)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    assert train(tmp_path / "whole", **{**options, "per_device_train_batch_size": 8}) == 0
    assert train(tmp_path / "split", **{**options, **split}) == 0
    for got, wanted in zip(metrics(tmp_path / "split"), metrics(tmp_path / "whole"), strict=True):
        assert (got["num_tokens"], got["num_target_tokens"]) == (wanted["num_tokens"], wanted["num_target_tokens"])
    tokens = sum(len(row["input_ids"]) for row in rows(25, weights=True))
    assert [line["num_tokens"] for line in metrics(tmp_path / "split")][3::4] == [tokens, 2 * tokens]


def test_a_rebalancing_sampler_that_is_not_known_is_refused():
    with pytest.raises(RuntimeError, match="not one that convexlm knows"):
        note_fillers(SimpleNamespace(has_tail=True, remainder=1))


@pytest.mark.parametrize("split", [(8, 1, 1), (2, 4, 1), (2, 1, 4), (1, 2, 4)])
def test_grouping_by_length_does_not_depend_on_how_the_batch_is_split(split):
    rows, accumulated, processes = split
    sampler = LengthGroupedSampler(rows * accumulated, lengths=list(range(70)))  # as the Trainer makes it

    class OfTheTrainer:
        def _get_train_sampler(self, train_dataset=None):
            return sampler

    class Made(SamplingOrder, OfTheTrainer):
        args = SimpleNamespace(world_size=processes, data_seed=None, seed=1, train_sampling_strategy="group_by_length")

    assert list(Made()._get_train_sampler()) == list(EpochLengthGroupedSampler(8, list(range(70)), 1))


def test_an_order_that_a_resume_would_not_have_again_is_refused(files, tmp_path, capfd):
    assert train(tmp_path / "run", accelerator_config='{"use_seedable_sampler": false}', **given(files)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert "use_seedable_sampler" in line


# -- in a script


def test_a_script_resumes_exactly_and_gets_no_marker(tmp_path):
    from convexlm import ConvexTrainer

    settings = {"max_steps": 8, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
                "optim": "adamw_torch", "lr_scheduler_type": "linear", "learning_rate": 0.01}  # fmt: skip
    data = rows(10, weights=True)
    whole = trained(tmp_path / "whole", data, **settings)
    assert [path.name for path in sorted((tmp_path / "whole").glob("checkpoint-*"))] == [
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert not list((tmp_path / "whole").rglob(COMPLETE_FILE)) and not list((tmp_path / "whole").rglob(SAVING_FILE))
    shutil.rmtree(tmp_path / "whole" / "checkpoint-8")
    again = make(tmp_path / "whole", data, **settings)
    again.train(resume_from_checkpoint=True)
    assert isinstance(again, ConvexTrainer)
    assert_same_weights(again, whole, rtol=0, atol=0)
    keep = lambda trainer: [line for line in trainer.state.log_history if "train_runtime" not in line]  # noqa: E731
    assert keep(again) == keep(whole)


def test_resuming_tied_weights_warns_of_nothing(tmp_path, caplog):
    from transformers.utils import logging as transformers_logging

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    data, folder = rows(8), tmp_path / "run"
    whole = trained(folder, data, model=tiny_model(tie_word_embeddings=True), **settings)
    shutil.rmtree(folder / "checkpoint-4")
    again = make(folder, data, model=tiny_model(tie_word_embeddings=True), **settings)
    transformers_logging.enable_propagation()
    try:
        again.train(resume_from_checkpoint=True)
    finally:
        transformers_logging.disable_propagation()
    assert "missing keys" not in caplog.text
    assert_same_weights(again, whole, rtol=0, atol=0)


# -- what could be run, and what could be told


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


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


def test_weights_in_a_pickle_are_refused(files, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    torch.save({"x": Payload(tmp_path / "executed")}, folder / "pytorch_model.bin")
    options = {key: value for key, value in given(files).items() if key not in ("config_name", "tokenizer_name")}
    assert train(tmp_path / "run", model_name_or_path=folder, **options) == 2
    assert "no weights in safetensors format" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "data.jsonl", "folder", "streamed"])
def test_data_in_a_pickle_are_refused(files, tmp_path, capfd, name):
    path = tmp_path / name
    if name in ("folder", "streamed"):
        path.mkdir()
        (path / "loader.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    target = path / "train.pkl" if path.is_dir() else path
    target.write_bytes(pickle.dumps([Payload(tmp_path / "executed")]))
    streaming = {"streaming": True} if name == "streamed" else {}
    assert train(tmp_path / "run", **given(files, dataset=path, **streaming)) == 2
    err = capfd.readouterr().err
    assert name.split(".")[0] in err and "Traceback" not in err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("flag", [False, True])
def test_code_of_a_model_runs_by_the_flag_alone(files, tmp_path, capfd, monkeypatch, flag):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import os\nos.makedirs({str(tmp_path / 'executed')!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    options = given(files, config_name=folder, max_steps=1)
    code = train(tmp_path / "run", **options, **({"trust_remote_code": True} if flag else {}))
    assert code == 2  # with the flag, too: there is no model class for the config
    assert (tmp_path / "executed").exists() == flag
    out, err = capfd.readouterr()
    assert "Traceback" not in err and out == ""  # nobody is asked on the terminal, either


def test_tokens_are_written_nowhere(files, tmp_path, monkeypatch, capfd):
    secrets = ("hf_SecretOfTheOption", "hf_SecretOfTheEnvironment")
    monkeypatch.setenv("HF_TOKEN", secrets[1])
    options = given(files, hub_token=secrets[0], max_steps=2, save_steps=2)
    assert train(tmp_path / "run", "--json", **options) == 0
    files_written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files_written)
    assert any(path.name == "README.md" for path in files_written)
    for path in files_written:
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert not any(secret in text for text in capfd.readouterr() for secret in secrets)


def test_push_to_hub_is_transformers_own(files, tmp_path, monkeypatch):
    """The option reaches transformers, which asks the hub for the repository with the token."""
    asked = []

    class Hub:
        def create_repo(self, name, **kwargs):
            asked.append((name, kwargs.get("token"), kwargs.get("private")))
            raise OSError("no network here")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    options = given(files, push_to_hub=True, hub_model_id="someone/model", hub_token="hf_x", hub_private_repo=True)
    assert train(tmp_path / "run", **options) == 2
    assert asked == [("someone/model", "hf_x", True)]


def test_a_folder_with_checkpoints_is_not_overwritten(files, copied, capfd):
    assert cli.main(["train", *words(**given(files), output_dir=copied)]) == 2
    assert "--resume" in capfd.readouterr().err
