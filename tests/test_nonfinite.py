"""Steps whose loss or gradient is not finite: stopped with the records' names, or skipped; and collapses told once."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from transformers import TrainerCallback

from convexlm import ConvexConfig, ConvexTrainer, cli
from convexlm.checkpoints import complete_checkpoints
from convexlm.errors import Stopped
from convexlm.metrics_file import MetricsFile, read_metrics
from convexlm.nonfinite import NonFiniteGuard
from trainer_helpers import assert_same_weights, logged, make
from training_helpers import TRAIN, WORDS, rows, tiny_model, words, write_model_files

POISON = WORDS - 1  # a token that no record has but one
SETTINGS = {
    "train_sampling_strategy": "sequential",
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "weight_decay": 0.1,
}


def poisoned_model(kind="loss", **changes):
    """A model that gives NaN wherever the poison is in its input: in its states, or in their gradient alone."""
    model = tiny_model(**changes)

    def hook(_module, inputs, output):
        poisoned = (inputs[0] == POISON).any()
        if kind == "loss":
            return output * math.nan if poisoned else output
        if poisoned and output.requires_grad:
            output.register_hook(lambda grad: grad * math.inf)
        return output

    model.get_input_embeddings().register_forward_hook(hook)
    return model


def records(count, bad=(), named=True):
    made = []
    for number, row in enumerate(rows(count, seed=2)):
        ids = [4 if token == POISON else token for token in row["input_ids"]]
        labels = [4 if token == POISON else token for token in row["labels"]]
        if number in bad:
            ids[1] = POISON
        made.append({"input_ids": ids, "labels": labels, **({"record_id": f"data:{number + 1}"} if named else {})})
    return made


def stopped(trainer):
    with pytest.raises(Stopped) as caught:
        trainer.train()
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_stops_with_the_names_of_its_records(tmp_path, kind):
    """Batches of 2, two of them a step: the records of step 2 are 5 to 8, and 7 is bad."""
    trainer = make(tmp_path, records(16, bad=[6]), model=poisoned_model(kind), per_device_train_batch_size=2,
                   gradient_accumulation_steps=2, **SETTINGS)  # fmt: skip
    before = []
    trainer.callback_handler.callbacks[0].on_step_end = lambda *_a, **_k: before.append(
        {name: value.clone() for name, value in trainer.model.state_dict().items()}
    )
    said = stopped(trainer)
    report = json.loads((tmp_path / "nonfinite-step-2.json").read_text(), parse_constant=lambda c: 1 / 0)
    wanted = ["data:7", "data:8"] if kind == "loss" else ["data:5", "data:6", "data:7", "data:8"]
    assert report["record_ids"] == wanted and report["step"] == 2 and report["weights_finite"] is True
    assert [batch["record_ids"] for batch in report["micro_batches"]] == [["data:5", "data:6"], ["data:7", "data:8"]]
    assert report["micro_batches"][1]["loss"] == "nan" if kind == "loss" else isinstance(report["loss"], float)
    assert report["grad_norm"] in ("nan", "inf") and report["objective"]["name"] == "convex"
    for part in ("step 2", "gradient norm", *wanted, "nonfinite-step-2.json", "--skip_nonfinite_steps"):
        assert part in said
    assert "\n" not in said
    assert len(before) == 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[0][name]), name


@pytest.mark.parametrize(
    "layout", [{"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}, {}]
)
@pytest.mark.parametrize("weights", [False, True])
def test_names_in_every_layout(tmp_path, layout, weights):
    data = [{**row, **({"weight": 1.0} if weights else {})} for row in records(12, bad=[4])]
    trainer = make(tmp_path, data, model=poisoned_model(), **{**SETTINGS, "per_device_train_batch_size": 3, **layout})
    stopped(trainer)
    (path,) = tmp_path.glob("nonfinite-step-*.json")
    named = json.loads(path.read_text())["record_ids"]
    assert "data:5" in named and len(named) < 12
    step = json.loads(path.read_text())["step"]
    if not layout.get("packing"):
        assert step == 2 and named == ["data:4", "data:5", "data:6"]
    else:
        held = trainer.train_dataset[3 * (step - 1) : 3 * step]
        wanted = {f"data:{number + 1}" for row in held["record_id"] for number in row}
        assert set(named) == wanted


def test_data_without_names_and_collators_of_ones_own(tmp_path):
    trainer = make(tmp_path / "a", records(8, bad=[0], named=False), model=poisoned_model(), **SETTINGS)
    assert "records unknown" in stopped(trainer)

    def collate(examples):
        assert all(set(example) <= {"input_ids", "labels", "seq_lengths"} for example in examples)
        longest = max(len(example["input_ids"]) for example in examples)
        pad = lambda ids, value: ids + [value] * (longest - len(ids))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(example["input_ids"], 0) for example in examples]),
            "labels": torch.tensor([pad(example["labels"], -100) for example in examples]),
            "attention_mask": torch.tensor([pad([1] * len(e["input_ids"]), 0) for e in examples]),
        }

    own = make(
        tmp_path / "b", records(8, bad=[0]), model=poisoned_model(), given={"data_collator": collate}, **SETTINGS
    )
    assert "records unknown" in stopped(own)


def test_names_change_nothing(tmp_path):
    named = make(tmp_path / "a", records(8), **SETTINGS)
    plain = make(tmp_path / "b", records(8, named=False), **SETTINGS)
    named.train()
    plain.train()
    assert_same_weights(named, plain, rtol=0, atol=0)
    assert named.evaluate(eval_dataset=named.train_dataset) and plain.evaluate(eval_dataset=plain.train_dataset)


# -- skipping


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("every", [1, 4])
def test_a_skipped_step_leaves_no_trace(tmp_path, kind, every):
    """As if the bad step's records had not been there: weights, optimizer, schedule; and it is counted."""
    data = records(16, bad=[5])
    good = data[:4] + data[8:]
    settings = {**SETTINGS, "skip_nonfinite_steps": True, "lr_scheduler_type": "linear", "logging_steps": every}
    got = make(tmp_path / "a", data, model=poisoned_model(kind), max_steps=4, **settings)
    got.add_callback(MetricsFile())
    got.train()
    wanted = make(tmp_path / "b", good, max_steps=4, **settings)
    wanted.add_callback(StopAfter(3))  # a schedule of four steps, of which three are made
    wanted.train()
    assert_same_weights(got, wanted, rtol=0, atol=0)
    theirs = wanted.optimizer.state_dict()["state"]
    for index, state in got.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, theirs[index][key]) for key, value in state.items())
    assert got.lr_scheduler.state_dict()["last_epoch"] == 3
    lines = [line for line in read_metrics(tmp_path / "a") if "loss" in line]
    if every == 4:
        assert [line["skipped_steps"] for line in lines] == [1]
        losses = [line["loss"] for line in wanted.state.log_history if "loss" in line]
        assert math.isfinite(lines[0]["loss"]) and losses == []  # it never came to a fourth step
    else:
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
        assert lines[1]["loss"] is None and "nll" not in lines[1]
        kept = [line for line in lines if line["loss"] is not None]
        assert [line["loss"] for line in kept] == logged(wanted, "loss").tolist()
        assert [line["nll"] for line in kept] == logged(wanted, "nll").tolist()
    assert json.loads((tmp_path / "a" / "nonfinite-step-2.json").read_text())["step"] == 2


def test_the_mean_loss_is_over_the_steps_that_were_made(tmp_path):
    settings = {**SETTINGS, "skip_nonfinite_steps": True, "learning_rate": 0.0, "weight_decay": 0.0}
    data = records(16, bad=[5])
    each = make(tmp_path / "a", data, model=poisoned_model(), max_steps=4, logging_steps=1, **settings)
    each.train()
    whole = make(tmp_path / "b", data, model=poisoned_model(), max_steps=4, logging_steps=4, **settings)
    whole.train()
    losses = [line["loss"] for line in each.state.log_history if math.isfinite(line.get("loss", math.nan))]
    assert len(losses) == 3
    assert whole.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_weights_that_are_not_finite_stop_in_any_case(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    trainer = make(tmp_path, records(8), model=model, skip_nonfinite_steps=True, **SETTINGS)
    assert "weights are not finite" in stopped(trainer)
    assert json.loads((tmp_path / "nonfinite-step-1.json").read_text())["weights_finite"] is False


def test_skipping_without_end_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("convexlm.nonfinite.MOST_SKIPS_IN_A_ROW", 3)
    trainer = make(tmp_path, records(8, bad=range(8)), model=poisoned_model(), skip_nonfinite_steps=True, **SETTINGS)
    assert "3 steps in a row were skipped" in stopped(trainer)
    assert trainer.state.global_step == 2


def test_an_overflow_of_scaled_gradients_is_the_scalers_own(tmp_path, monkeypatch):
    """With loss scaling, a gradient that is not finite stops nothing as long as the loss is finite."""
    monkeypatch.setattr(NonFiniteGuard, "_scales_gradients", lambda self: True)
    trainer = make(tmp_path / "a", records(8, bad=[0]), model=poisoned_model("gradient"), max_steps=1, **SETTINGS)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.skipped_steps == 0
    trainer = make(tmp_path / "b", records(8, bad=[0]), model=poisoned_model("loss"), max_steps=1, **SETTINGS)
    assert "loss nan" in stopped(trainer)


def test_the_command_line_ends_with_one_line_and_1(tmp_path, capsys, monkeypatch):
    """And the checkpoint before it is there to go on from."""
    write_model_files(tmp_path / "model")
    lines = [{"prompt": f"w{number} w1", "completion": "w2 w3"} for number in range(8)]
    lines[6]["prompt"] = f"w{POISON - 4}"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("convexlm.training_model._new_model", lambda *_: poisoned_model())
    options = words(config_name=tmp_path / "model", tokenizer_name=tmp_path / "model", dataset=tmp_path / "data.jsonl",
                    output_dir=tmp_path / "run", per_device_train_batch_size=1, save_steps=1,
                    train_sampling_strategy="sequential", max_steps=8)  # fmt: skip
    assert cli.main(["train", *TRAIN, *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    last = err.rstrip().split("\n")[-1]
    assert last.startswith("convexlm train: step 7: loss nan") and "records data.jsonl:7;" in last
    assert complete_checkpoints(tmp_path / "run")[-1].name == "checkpoint-6"
    assert cli.main(["train", *TRAIN, *options, "--resume", "--skip_nonfinite_steps"]) == 0
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "run")[6:]] == [1, 1]


# -- a collapse


def collapsed(trainer, shares):
    for step, share in enumerate(shares, start=1):
        trainer.state.global_step = step
        trainer._watch_collapse({"effective_sample_size": share, "num_target_tokens": 9})


def test_a_collapse_is_told_once_with_advice(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="convexlm.nonfinite"):
        collapsed(make(tmp_path, rows(4)), [0.01, 0.01, 0.5, 0.01, 0.01])
        assert not caplog.records
        collapsed(make(tmp_path, rows(4)), [0.5, 0.04, 0.01, 0.02, 0.01, 0.6, 0.01, 0.01, 0.01])
    (record,) = caplog.records
    said = record.getMessage()
    for part in ("step 4", "effective sample size", "smaller k", "mle_mix", "MLE phase first"):
        assert part in said
    caplog.clear()
    collapsed(make(tmp_path, rows(4), min_effective_sample_size=0.0), [0.001] * 9)
    assert not caplog.records


def test_a_collapse_in_training(tmp_path, caplog):
    """At k = 50 a random model gives all its weight to a record or two."""
    data = rows(32)
    settings = {"objective": "convex", "k": 50.0, "per_device_train_batch_size": 32, "learning_rate": 0.0}
    with caplog.at_level(logging.WARNING, logger="convexlm.nonfinite"):
        trainer = make(tmp_path, data, min_effective_sample_size=0.2, max_steps=5, **settings)
        trainer.train()
    assert logged(trainer, "effective_sample_size").max() < 0.2
    assert len(caplog.records) == 1


@pytest.mark.parametrize("bad", [-0.1, 1.0, math.nan])
def test_a_threshold_is_a_share(tmp_path, bad):
    with pytest.raises(ValueError, match="min_effective_sample_size"):
        ConvexConfig(output_dir=str(tmp_path), min_effective_sample_size=bad)


# -- what is summed up ------------------------------------------------------------------------------------------------


def test_the_mean_loss_of_a_run_is_over_the_steps_that_were_made(tmp_path):
    settings = {**SETTINGS, "learning_rate": 0.0, "logging_steps": 4, "max_steps": 4, "per_device_train_batch_size": 2}
    trainer = make(tmp_path, records(8, bad=[2, 5]), model=poisoned_model(), skip_nonfinite_steps=True, **settings)
    output = trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["skipped_steps"] == 2
    assert output.metrics["train_loss"] == pytest.approx(logs["loss"], rel=1e-6)
    assert output.training_loss == output.metrics["train_loss"]
    assert trainer.train().metrics["train_loss"] == pytest.approx(logs["loss"], rel=1e-6)


class OutOfMemoryOnce(ConvexTrainer):
    """Runs out of memory in its second micro-batch."""

    calls = 0

    def training_step(self, *args, **kwargs):
        self.calls += 1
        loss = super().training_step(*args, **kwargs)
        if self.calls == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_statistics_begin_again_with_a_smaller_batch(tmp_path):
    settings = {**SETTINGS, "learning_rate": 0.0, "logging_steps": 4, "max_steps": 4}
    again = make(tmp_path, records(8), cls=OutOfMemoryOnce, auto_find_batch_size=True, **settings,
                 per_device_train_batch_size=8)  # fmt: skip
    again.train()
    size = again._train_batch_size
    assert size < 8
    once = make(tmp_path, records(8), per_device_train_batch_size=size, **settings)
    once.train()
    got, wanted = again.state.log_history[0], once.state.log_history[0]
    for name in ("loss", "nll", "num_target_tokens", "num_tokens"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-6), name
