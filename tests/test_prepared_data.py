"""Data that come tokenized, masked or packed already, and `predict`: the targets are those that were meant."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import pack_dataset

from convexlm.collator import ConvexCollator
from trainer_helpers import logged, make, per_record
from training_helpers import WORDS, rows, tiny_model


def masked(data):
    """Records with `completion_mask` in place of labels."""
    return [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
        for row in data
    ]


def nll(data):
    with torch.no_grad():
        log_probs = [log_p for log_p, _, _ in per_record(tiny_model(), data)]
    return -torch.cat(log_probs).mean().item()


# -- rows that are packed already -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True}], ids=str)
@pytest.mark.parametrize("limit", [32, 20])  # the rows are packed to 32
@pytest.mark.parametrize("labels", [True, False])
def test_packed_rows_keep_their_targets_and_their_length(tmp_path, layout, limit, labels):
    data = rows(12)
    packed = pack_dataset(Dataset.from_list(data if labels else masked(data)), 32, "bfd")
    run = make(tmp_path, packed, eval_data=packed, max_length=limit, completion_only_loss=True, learning_rate=0.0,
               max_steps=1, per_device_train_batch_size=len(packed), **layout)  # fmt: skip
    run.train()
    assert logged(run, "num_target_tokens") == sum(label != -100 for row in data for label in row["labels"])
    assert logged(run, "nll").item() == pytest.approx(nll(data), rel=1e-5)
    for found, prefix in ((run.evaluate(packed), "eval"), (run.predict(packed).metrics, "test")):
        assert found[f"{prefix}_nll"] == pytest.approx(nll(data), rel=1e-5)


def test_packed_rows_in_padded_batches_are_refused(tmp_path):
    data = rows(8)
    packed = pack_dataset(Dataset.from_list(data), 32, "bfd")
    reason = r"dataset is packed already \(it has a column `seq_lengths`\).* use `packing=True` or `padding_free=True`"
    for prepared in (False, True):
        settings = {"dataset_kwargs": {"skip_prepare_dataset": prepared}}
        for train, evaluated in ((packed, None), (data, packed), (data, {"own": packed})):
            with pytest.raises(ValueError, match=reason):
                make(tmp_path, train, eval_data=evaluated, **settings)
        trainer = make(tmp_path, data, **settings)
        for use in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match=reason):
                use(packed)
    make(tmp_path, packed, given={"data_collator": ConvexCollator(0, padding_free=True)})


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_free": True}], ids=str)
def test_labels_that_do_not_go_with_the_tokens_are_refused(tmp_path, layout):
    """As where `labels` is the answer alone; in a padded batch of as many of both nothing would fail."""
    data = [{**row, "labels": [label for label in row["labels"] if label != -100]} for row in rows(2)]
    data.append({"input_ids": [1, 5], "labels": [4] * max(len(row["input_ids"]) for row in data)})
    with pytest.raises(ValueError, match=r"a record has \d+ `labels` for \d+ `input_ids`; they are one a token"):
        make(tmp_path, data, **layout).train()
    with pytest.raises(ValueError, match="a record has 1 `labels` for 2 `input_ids`"):
        ConvexCollator(0)([{"input_ids": [5, 6], "labels": [6]}])


# -- predict ----------------------------------------------------------------------------------------------------------


def test_predict_takes_what_evaluate_takes(tmp_path):
    data = rows(6)
    words = [
        {"prompt": " ".join(f"w{i}" for i in range(n)), "completion": " " + " ".join(f"w{i}" for i in range(n, 7))}
        for n in range(2, 6)
    ]
    trainer = make(tmp_path, data, completion_only_loss=True)
    for given in (data, masked(data), words):
        dataset = Dataset.from_list(given)
        got, wanted = trainer.predict(dataset), trainer.evaluate(dataset)
        for name in ("loss", "nll", "num_target_tokens"):
            assert got.metrics[f"test_{name}"] == pytest.approx(wanted[f"eval_{name}"], rel=1e-6), name
        assert got.predictions.shape[::2] == (len(given), WORDS)


@pytest.mark.parametrize("options", [{"padding_free": True}, {"packing": True, "max_length": 40}, {}])
def test_predict_gives_the_logits_of_each_record_alone(tmp_path, options):
    data = rows(11, seed=5)
    trainer = make(tmp_path, rows(8), per_device_eval_batch_size=4, **options)
    found = trainer.predict(Dataset.from_list(data))
    assert len(found.predictions) == 11
    for row, logits, labels in zip(data, found.predictions, found.label_ids, strict=True):
        with torch.no_grad():
            alone = trainer.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        length = len(row["input_ids"])
        assert torch.tensor(logits[:length]).allclose(alone, atol=1e-4)
        assert labels[:length].tolist()[1:] == row["labels"][1:]


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"packing": True, "max_length": 40}])
def test_dropping_the_last_batch_is_for_training_alone(tmp_path, options):
    """transformers drops it of evaluations too, which are then of other data, and none where there is one batch."""
    dropped = make(tmp_path / "a", rows(8), dataloader_drop_last=True, per_device_eval_batch_size=4, **options)
    whole = make(tmp_path / "b", rows(8), per_device_eval_batch_size=3, **options)
    for count in (11, 3):
        data = Dataset.from_list(rows(count, seed=5))
        got, wanted = dropped.evaluate(data), whole.evaluate(data)
        for name in ("loss", "nll", "num_target_tokens"):
            assert got[f"eval_{name}"] == pytest.approx(wanted[f"eval_{name}"], rel=1e-6), name
        assert len(dropped.predict(data).predictions) == count
    assert dropped.args.dataloader_drop_last
    assert (
        len(
            make(
                tmp_path / "c", rows(11), dataloader_drop_last=True, per_device_train_batch_size=4
            ).get_train_dataloader()
        )
        == 2
    )


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_predict_gives_a_row_a_record_and_cuts_it(tmp_path, mode):
    data = [{"input_ids": [1, 5, 6, 7, 8, 2], "labels": [-100] * 5 + [2]}, *rows(4)]  # of it no target is left
    trainer = make(tmp_path, rows(8), packing=True, max_length=5, truncation_mode=mode, shuffle_dataset=True)
    found = trainer.predict(Dataset.from_list(data))
    kept = slice(5) if mode == "keep_start" else slice(-5, None)
    assert found.label_ids.shape == (5, 5)
    for got, row in zip(found.label_ids.tolist(), data, strict=True):
        assert got[1:] == (row["labels"][kept] + [-100] * 5)[1:5]  # nothing predicts the first


def test_a_bad_weight_is_refused_with_its_record_in_predict(tmp_path):
    trainer = make(tmp_path, rows(4))
    with pytest.raises(ValueError, match="test dataset, record 1: a record's `weight`"):
        trainer.predict(Dataset.from_list([{**row, "weight": 1.0 - 2 * n} for n, row in enumerate(rows(3))]))


# -- names ------------------------------------------------------------------------------------------------------------


def test_an_evaluation_set_called_train_leaves_the_names_of_the_training_records(tmp_path):
    data, other = ([{**row, "record_id": f"{name}{n}"} for n, row in enumerate(rows(6))] for name in "ab")
    trainer = make(tmp_path, data, eval_data={"train": Dataset.from_list(other)}, packing=True)
    trainer.evaluate({"train": Dataset.from_list(other)})
    assert list(trainer._record_names) == [row["record_id"] for row in data]
