"""SIGTERM and SIGINT save and stop; what goes on from there is the run that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from convexlm.checkpoints import complete_checkpoints, read_inventory
from convexlm.interrupts import SignalWatch, agreed_signal
from convexlm.metrics_file import read_metrics
from convexlm.trainer import ConvexTrainer
from pipeline_helpers import recipe_with, write_recipe
from resume_helpers import metrics, write_files
from training_helpers import Run, environment, train

# -- noting signals


@pytest.fixture(autouse=True)
def _handlers():
    """Whoever runs the tests in the background has them ignore Ctrl-C; and no handler is left behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) in (handler, signal.default_int_handler)
        signal.signal(number, handler)


def test_a_watch_notes_the_first_signal_and_gives_the_handlers_back(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with SignalWatch() as watch:
        assert watch.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send several
        assert watch.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err == "  SIGTERM: finishing this step, then saving\n"


def test_a_second_ctrl_c_aborts(capfd):
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again aborts at once" in capfd.readouterr().err


def test_ignored_signals_stay_ignored_and_threads_change_nothing():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGINT)
    assert watch.number is None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []

    def elsewhere():
        with SignalWatch():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_forked_worker_minds_the_parents_sigterm_and_no_ctrl_c():
    with SignalWatch() as watch:
        pid = os.fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert watch.number is None


def test_one_process_agrees_with_itself():
    assert agreed_signal(None, torch.device("cpu")) is None
    assert agreed_signal(15, torch.device("cpu")) == 15


# -- training


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def given(files, **settings):
    made = {
        "config_name": files / "model",
        "tokenizer_name": files / "model",
        "dataset": files / "data.jsonl",
        "eval_dataset": files / "data.jsonl",
        "eval_strategy": "epoch",
        "max_steps": 9,
        "save_steps": 4,
        "save_total_limit": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 5,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
    }
    return {**made, **settings}


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(folder, **given(files)) == 0
    return folder


def signal_at(monkeypatch, step, number=signal.SIGTERM, times=1):
    """A signal to this process in the n-th step that it makes."""
    begin, steps = ConvexTrainer._begin_step, [0]

    def begin_step(self):
        steps[0] += 1
        if steps[0] == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        begin(self)

    monkeypatch.setattr(ConvexTrainer, "_begin_step", begin_step)


# Five steps an epoch, saved at 4 and 8: in the middle, where a save is due, at an epoch's end, before, and at the end.
@pytest.mark.parametrize(
    ("number", "step"),
    [*((signal.SIGTERM, step) for step in (2, 4, 5, 7, 9)), (signal.SIGINT, 2), (signal.SIGINT, 9)],
)
def test_stopped_and_gone_on_is_never_stopped(files, undisturbed, tmp_path, monkeypatch, capfd, step, number):
    run, options = tmp_path / "run", given(files)
    with monkeypatch.context() as patch:
        signal_at(patch, step, number)
        assert train(run, "--json", **options) == 128 + number
    out, err = capfd.readouterr()
    last = err.rstrip().split("\n")[-1]
    assert out == "" and "Traceback" not in err
    assert f"convexlm train: stopped by {signal.Signals(number).name}" in last and "--resume" in last
    newest = complete_checkpoints(run)[-1]
    assert newest.name == f"checkpoint-{step}"
    assert read_inventory(newest)["interrupted"] == (step not in (4, 9))
    if step < 9:
        assert f"after step {step} of 9" in last and str(run) in last
    assert train(run, "--json", "--resume", **options) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["checkpoints"] == ["checkpoint-8", "checkpoint-9"] and result["steps"] == 9
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]
    assert metrics(run) == metrics(undisturbed)
    theirs = Run(undisturbed, 9).weights
    assert all(torch.equal(value, theirs[name]) for name, value in Run(run, 9).weights.items())


def test_stopped_twice_and_without_any_saving_of_its_own(files, undisturbed, tmp_path, monkeypatch):
    """Preempted runs have to go on even under `save_strategy no` and `save_only_model`."""
    run, options = tmp_path / "run", given(files, save_strategy="no", save_only_model=True)
    for at, reached in ((3, 3), (2, 5)):
        with monkeypatch.context() as patch:
            signal_at(patch, at)
            assert train(run, *(["--resume"] if reached > 3 else []), **options) == 143
        assert [path.name for path in run.glob("checkpoint-*")][-1:] == [f"checkpoint-{reached}"]
    assert len(list(run.glob("checkpoint-*"))) == 1
    assert train(run, "--resume", **options) == 0
    assert metrics(run) == metrics(undisturbed)
    assert not list(run.glob("checkpoint-*"))


def test_what_was_saved_for_a_signal_is_never_the_best(files, tmp_path, monkeypatch, capfd):
    """It goes when the next one is there. All evaluations are as good here, so the first that stays is the best."""
    run = tmp_path / "run"
    options = given(files, eval_strategy="steps", eval_steps=1, max_steps=4, metric_for_best_model="num_target_tokens",
                    save_steps=3)  # fmt: skip
    with monkeypatch.context() as patch:
        signal_at(patch, 2)
        assert train(run, **options) == 143
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2"]
    capfd.readouterr()
    assert train(run, "--json", "--resume", **options) == 0
    assert json.loads(capfd.readouterr().out)["best_checkpoint"] == str(run / "checkpoint-3")


def test_two_ctrl_c_leave_what_was_there(files, tmp_path, monkeypatch, capfd):
    run, options = tmp_path / "run", given(files)
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGINT, times=2)
        assert train(run, **options) == 130
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-4"]


def test_a_recipe_stops_and_goes_on_with_the_same_command(tmp_path, monkeypatch, capfd):
    from convexlm import cli

    recipe = recipe_with(
        seeds=[1],
        arms={"mle": {"objective": "mle"}},
        test_sets=[{"name": "toy", "kind": "tinyworld", "pairs": ["en-de"], "size": 2, "seed": 5}],
        decode={"checkpoints": "last", "batch_size": 2, "searches": [{"num_beams": 1, "max_new_tokens": 4}]},
    )
    write_recipe(tmp_path, recipe)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        signal_at(patch, 5)
        assert cli.main(["run", "tiny.yaml", "--run_dir", "run"]) == 143
    last = capfd.readouterr().err.rstrip().split("\n")[-1]
    assert last.startswith("convexlm run: stopped by SIGTERM after step 5 of 6; checkpoint-5 in run/train/mle is")
    assert last.endswith("the same command goes on from there")
    assert cli.main(["run", "tiny.yaml", "--run_dir", "run"]) == 0
    assert "going on from checkpoint-5" in capfd.readouterr().err
    names = sorted(path.name for path in (tmp_path / "run" / "train" / "mle").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-6"]


# -- two processes


@pytest.fixture(scope="module")
def on_two(files, tmp_path_factory):
    home = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("on_two_ranks.py")
    made = {**environment(), "HF_DATASETS_CACHE": str(home / "cache")}
    words = [sys.executable, script, home, files / "model", files / "data.jsonl"]
    done = subprocess.run(words, env=made, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return home, json.loads((home / "result.json").read_text())


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(on_two):
    home, result = on_two
    assert result["whole"]["codes"] == [0, 0], result["whole"]["logs"]
    assert result["stopped"]["codes"] == [143, 143], result["stopped"]["logs"]
    assert result["stopped"]["folders"] == ["checkpoint-5"]
    first, second = result["stopped"]["logs"]
    assert first.count("stopped by SIGTERM after step 5 of 8") == 1 and "stopped by" not in second
    assert result["stopped, resumed"]["codes"] == [0, 0], result["stopped, resumed"]["logs"]
    assert result["stopped, resumed"]["folders"] == ["checkpoint-8"]
    assert metrics(home / "stopped") == metrics(home / "whole")
    theirs = Run(home / "whole", 8).weights
    assert all(torch.equal(value, theirs[name]) for name, value in Run(home / "stopped", 8).weights.items())


@pytest.mark.slow
def test_a_bad_loss_of_one_process_stops_or_skips_on_all(on_two):
    home, result = on_two
    assert result["nan"]["codes"] == [1, 1], result["nan"]["logs"]
    report = json.loads((home / "nan" / "nonfinite-step-3.json").read_text())
    batches = {batch["process"]: batch for batch in report["micro_batches"]}
    assert batches[1]["loss"] == "nan" and isinstance(batches[0]["loss"], float)
    assert report["record_ids"] == batches[1]["record_ids"] and len(report["record_ids"]) == 2
    assert result["nan"]["logs"][0].count("loss nan") == 1 and "loss nan" not in result["nan"]["logs"][1]
    assert result["skipped"]["codes"] == [0, 0], result["skipped"]["logs"]
    lines = read_metrics(home / "skipped")
    assert [line["skipped_steps"] for line in lines] == [1, 1]
    assert lines[0]["loss"] is not None and lines[0]["num_target_tokens"] > 0


@pytest.mark.slow
def test_two_processes_stream_different_records(on_two):
    """In the order of the data, four a step: the tokens that were seen are those of the first records."""
    home, result = on_two
    assert result["streamed"]["codes"] == [0, 0], result["streamed"]["logs"]
    from training_helpers import rows

    lengths = [len(row["input_ids"]) for row in rows(25, weights=True)]
    assert read_metrics(home / "streamed")[0]["num_tokens"] == sum(lengths[: 3 * 4])


@pytest.mark.slow
def test_the_mean_loss_is_of_all_processes_and_of_the_steps_that_were_made(on_two):
    """Also of steps 7 and 8, which are not logged any more, and after a resume at step 5, for which 4 and 5 wait."""
    home, result = on_two
    assert result["each step"]["codes"] == [0, 0], result["each step"]["logs"]
    losses = [line["loss"] for line in read_metrics(home / "each step")]
    assert len(losses) == 8
    for name, made in (("each step", losses), ("whole", losses), ("stopped, resumed", losses[5:])):
        for loss in result[name]["train_loss"]:
            assert loss == pytest.approx(sum(made) / len(made), rel=1e-6), name
        assert len(result[name]["train_loss"]) == 2


@pytest.mark.slow
def test_records_that_fill_up_a_rebalanced_step_do_not_count(on_two):
    home, result = on_two
    assert result["rebalanced"]["codes"] == [0, 0], result["rebalanced"]["logs"]
    from training_helpers import rows

    tokens = sum(len(row["input_ids"]) for row in rows(25, weights=True))
    assert Run(home / "rebalanced", 8).train[-1]["step"] == 6, "within the second epoch of four steps"
    state = json.loads((home / "rebalanced" / "checkpoint-8" / "training_progress.json").read_text())
    seen = sum(part["seen"] for part in state["processes"])
    assert Run(home / "rebalanced", 8).train[-1]["num_tokens"] + seen == 2 * tokens
