"""A run that is killed at any moment goes on as if it had not been: its log, weights and order of the data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from convexlm.checkpoints import COMPLETE_FILE, SAVING_FILE, complete_checkpoints
from convexlm.metrics_file import read_metrics
from convexlm.sampling import EpochLengthGroupedSampler, SamplingOrder, note_fillers, set_epoch
from resume_helpers import assert_same_run, given, metrics, write_files
from trainer_helpers import assert_same_weights, make, trained
from training_helpers import environment, rows, tiny_model, train, words


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


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
