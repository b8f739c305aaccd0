"""Record weights in `ConvexTrainer`: repetitions, packing, streams."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trainer_helpers import KINDS, assert_same_weights, logged, make, one_step, per_record, trained
from training_helpers import STATISTICS, rows, tiny_model

# -- record weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("packing", [False, True])
def test_a_weight_is_a_number_of_repetitions(tmp_path, kind, packing):
    data = rows(6)
    counts = [1, 2, 0, 3, 1, 0]
    weighted = [{**row, "weight": float(n)} for row, n in zip(data, counts, strict=True)]
    repeated = [row for row, n in zip(data, counts, strict=True) for _ in range(n)]
    layout = {"per_device_train_batch_size": 16, "packing": packing, **kind}
    got, log = one_step(tmp_path / "a", weighted, **layout)
    wanted, repeated_log = one_step(tmp_path / "b", repeated, **layout)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)
    for name in set(STATISTICS) - {"num_target_tokens"}:
        assert log[name] == pytest.approx(repeated_log[name], rel=1e-5), name


def test_no_weight_is_weight_one(tmp_path):
    data = rows(6)
    sparse = [{**row, "weight": None if number % 2 else 1.0} for number, row in enumerate(data)]
    assert_same_weights(trained(tmp_path / "a", sparse), trained(tmp_path / "b", data), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("packing", [False, True])
def test_a_bad_weight_is_refused_with_its_record(tmp_path, bad, packing):
    data = [{**row, "weight": bad if number == 4 else 1.0} for number, row in enumerate(rows(6))]
    with pytest.raises(ValueError, match=r"train dataset, record 4: .*weight.*at least 0"):
        make(tmp_path, data, packing=packing)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_a_dataset_with_a_format_of_its_own(tmp_path, kind, packing):
    data = Dataset.from_list(rows(8, weights=True))
    settings = {"per_device_train_batch_size": 2, "packing": packing, "max_steps": 2}
    wanted = trained(tmp_path / "a", data, **settings)
    got = trained(tmp_path / "b", data.with_format(kind), **settings)
    assert_same_weights(got, wanted, rtol=0, atol=0)
    packed = {"skip_prepare_dataset": True}  # and one that is packed already
    again = trained(tmp_path / "c", wanted.train_dataset.with_format(kind), dataset_kwargs=packed, **settings)
    assert_same_weights(again, wanted, rtol=0, atol=0)


def test_a_weight_that_is_no_number_for_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train dataset, record 0: a record's `weight` must be a number, not 'heavy'"):
        make(tmp_path, [{**row, "weight": "heavy"} for row in rows(4)])
    trainer = make(tmp_path, [{**row, "weight": [2.0]} for row in rows(4)])  # looks like a row that is packed already
    with pytest.raises(ValueError, match="a list of 1 numbers for .* tokens; give one number a record"):
        trainer.train()


def test_a_collator_of_ones_own_does_not_lose_the_weights_of_data_that_come_later(tmp_path):
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    trainer = make(tmp_path, rows(4), given={"data_collator": collator})
    weighted = Dataset.from_list(rows(5, weights=True))
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="dataset has a column `weight`, which only a"):
            use(weighted)
        use(weighted.remove_columns("weight"))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_rows_that_are_packed_already_are_not_packed_again(tmp_path, strategy, weights):
    data = rows(12, weights=weights)
    trainer = make(tmp_path, rows(4), eval_data=data, packing=True, packing_strategy=strategy, max_length=30,
                   objective="dft", per_device_eval_batch_size=2)  # fmt: skip
    wanted = trainer.evaluate()
    # Of a dict TRL prepares each dataset twice.
    for given, prefix in (({"own": Dataset.from_list(data)}, "eval_own"), (trainer.eval_dataset, "eval")):
        got = trainer.evaluate(given)
        for name in STATISTICS:
            assert got[f"{prefix}_{name}"] == pytest.approx(wanted[f"eval_{name}"], rel=1e-6), name


WEIGHTLESS = [{**row, "weight": 0.0} for row in rows(6)]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_0_throughout_are_refused(tmp_path, packing, prepared):
    settings = {"packing": packing, "dataset_kwargs": {"skip_prepare_dataset": prepared}}
    weightless = Dataset.from_list(WEIGHTLESS)
    for data, evaluated, name in (
        (WEIGHTLESS, None, "train"),
        (rows(6), weightless, "eval"),
        (rows(6), {"good": Dataset.from_list(rows(6)), "bad": weightless}, "bad"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*: every record has the weight 0") as caught:
            make(tmp_path, data, eval_data=evaluated, **settings)
        assert "\n" not in str(caught.value)
    trainer = make(tmp_path, rows(6), eval_data=[*rows(6), *WEIGHTLESS], **settings)
    if not prepared:
        with pytest.raises(ValueError, match="every record has the weight 0"):
            trainer.evaluate(weightless)


def test_an_evaluation_in_which_nothing_counted_has_no_figures_and_is_not_the_best(tmp_path):
    stream = Dataset.from_list(WEIGHTLESS).to_iterable_dataset()
    trainer = make(tmp_path, rows(6), eval_data=stream, metric_for_best_model="nll")
    found = trainer.evaluate()
    for name in set(STATISTICS) - {"num_target_tokens"}:
        assert math.isnan(found[f"eval_{name}"]), name
    assert found["eval_num_target_tokens"] == 0
    assert not trainer._determine_best_metric(found, None)
    found = trainer.evaluate(Dataset.from_list(rows(6)))
    assert all(math.isfinite(found[f"eval_{name}"]) for name in STATISTICS)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
@pytest.mark.parametrize("objective", ["mle", "dft"])
def test_weights_survive_packing_that_cuts(tmp_path, strategy, objective):
    """Every target token of a record keeps the record's weight: the loss is their weighted mean."""
    draw = rows(9, longest=20)
    data = [{**row, "weight": (0.0, 1.0, 2.5)[number % 3]} for number, row in enumerate(draw)]
    trainer = make(tmp_path, data, packing=True, packing_strategy=strategy, max_length=16, objective=objective,
                   max_steps=1, per_device_train_batch_size=32)  # fmt: skip
    trainer.train()
    packed = list(trainer.train_dataset)
    total = parts = 0.0
    for row in packed:
        starts = {0}
        if strategy == "bfd_split":
            lengths = row["seq_lengths"]
            starts = {sum(lengths[:n]) for n in range(len(lengths))}
        for start in sorted(starts):
            end = min([s for s in starts if s > start], default=len(row["input_ids"]))
            piece = {key: row[key][start:end] for key in ("input_ids", "labels")}
            with torch.no_grad():
                log_p = per_record(tiny_model(), [piece])[0][0]
            weights = [
                w for w, y in zip(row["weight"][start + 1 : end], piece["labels"][1:], strict=True) if y != -100
            ]
            value = -log_p if objective == "mle" else 1 - log_p.exp()
            parts += (value * torch.tensor(weights, dtype=torch.float64)).sum().item() if weights else 0.0
            total += sum(weights)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(parts / total, rel=1e-5)


def test_a_stream_gives_the_same_numbers(tmp_path):
    """Also where it ends within an optimizer step."""
    data = rows(11, weights=True)
    layout = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 7}
    wanted = trained(tmp_path / "a", data, train_sampling_strategy="sequential", **layout)
    got = trained(tmp_path / "b", Dataset.from_list(data).to_iterable_dataset(), **layout)
    for name in (*STATISTICS, "grad_norm", "num_tokens"):
        torch.testing.assert_close(logged(got, name), logged(wanted, name), rtol=1e-5, atol=1e-7)
    assert_same_weights(got, wanted)


def test_a_stream_of_unknown_columns_keeps_its_weights_through_packing(tmp_path):
    data = rows(9, weights=True)

    def generate():
        yield from data

    from datasets import IterableDataset

    layout = {"per_device_train_batch_size": 16, "packing": True, "max_steps": 2}
    wanted = trained(tmp_path / "a", data, **layout)
    stream = IterableDataset.from_generator(generate)
    assert stream.column_names is None
    got = trained(tmp_path / "b", stream, **layout)
    torch.testing.assert_close(logged(got, "loss"), logged(wanted, "loss"), rtol=1e-5, atol=0)
