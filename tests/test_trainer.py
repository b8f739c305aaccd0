"""`ConvexTrainer` held against TRL's trainer, against formulas on full logits, and against hostile batches."""

from __future__ import annotations

import ast
import copy
import json
import math
import re
import types
from dataclasses import dataclass

import peft
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from convexlm import get_objective
from convexlm.metrics_file import MetricsFile, read_metrics
from convexlm.objectives import Objective, register_objective
from trainer_helpers import KINDS, assert_same_weights, logged, make, one_step, per_record, trained
from training_helpers import STATISTICS, rows, tiny_model, train

# -- against TRL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "loss_type"), [("mle", "nll"), ("dft", "dft")])
@pytest.mark.parametrize("packing", [False, True])
def test_same_trajectory_as_trl(tmp_path, objective, loss_type, packing):
    data = rows(21)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "packing": packing}
    ours = trained(tmp_path / "ours", data, objective=objective, **settings)
    theirs = make(tmp_path / "trl", data, cls=SFTTrainer, config=SFTConfig, loss_type=loss_type, **settings)
    theirs.train()
    torch.testing.assert_close(logged(ours, "grad_norm"), logged(theirs, "grad_norm"), rtol=1e-5, atol=0)
    assert_same_weights(ours, theirs)
    if objective == "mle":
        torch.testing.assert_close(logged(ours, "loss"), logged(theirs, "loss"), rtol=1e-6, atol=0)
        torch.testing.assert_close(logged(ours, "nll"), logged(theirs, "loss"), rtol=1e-6, atol=0)
    torch.testing.assert_close(logged(ours, "num_tokens"), logged(theirs, "num_tokens"))


def mixture():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=44,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            router_aux_loss_coef=0.5,
            output_router_logits=True,
        )
    )


@pytest.mark.parametrize("packing", [False, True])  # packed rows are padded here, and flattened in TRL
def test_load_balancing_loss_is_scaled_as_trl_does(tmp_path, packing):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 4, "packing": packing}
    ours = trained(tmp_path / "ours", rows(14), model=mixture(), objective="mle", **settings)
    theirs = make(tmp_path / "trl", rows(14), model=mixture(), cls=SFTTrainer, config=SFTConfig, **settings)
    theirs.train()
    for name in ("loss", "grad_norm", "aux_loss"):
        torch.testing.assert_close(logged(ours, name), logged(theirs, name), rtol=1e-5, atol=0)
    assert_same_weights(ours, theirs)
    assert (logged(ours, "loss") - logged(ours, "nll") > 0.1).all()  # the auxiliary loss is in the one only


def test_the_load_balancing_loss_of_an_evaluation_is_of_its_own_data(tmp_path):
    small, large = Dataset.from_list(rows(4)), Dataset.from_list(rows(10, seed=7))
    trainer = make(tmp_path, rows(4), model=mixture(), eval_data=small)
    wanted = {}
    for name, data in (("small", small), ("large", large)):
        parts = [list(data)[start : start + 8] for start in range(0, len(data), 8)]
        losses = [mixture().eval()(**trainer.data_collator(part)).aux_loss for part in parts]
        wanted[name] = torch.stack(losses).mean().item()
    assert trainer.predict(large).metrics["test_aux_loss"] == pytest.approx(wanted["large"], rel=1e-5)
    assert trainer.evaluate()["eval_aux_loss"] == pytest.approx(wanted["small"], rel=1e-5)
    found = trainer.evaluate({"small": small, "large": large})
    for name, value in wanted.items():
        assert found[f"eval_{name}_aux_loss"] == pytest.approx(value, rel=1e-5)
    assert [name for line in trainer.state.log_history for name in line if name.endswith("aux_loss")] == [
        "eval_aux_loss",
        "eval_small_aux_loss",
        "eval_large_aux_loss",
    ]


# -- against formulas -------------------------------------------------------------------------------------------------


def test_reference_formula_and_statistics_from_the_full_logits(tmp_path):
    """The paper's loss, sum_i T_i (-exp(m_i)) / sum_i T_i: the same gradient, and our loss is it plus one."""
    data = rows(8)
    model = tiny_model()
    found = per_record(model, data)
    tokens = sum(len(log_p) for log_p, _, _ in found)
    loss = sum(-len(log_p) * log_p.mean().exp() for log_p, _, _ in found) / tokens
    loss.backward()
    grads, log = one_step(tmp_path, data, objective="convex", k=1.0, per_device_train_batch_size=2,
                          gradient_accumulation_steps=4, max_grad_norm=0.0)  # fmt: skip
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-7)
    weights = torch.stack([log_p.mean().exp() for log_p, _, _ in found]).detach()
    wanted = {
        "loss": loss.item() + 1,
        "nll": -sum(log_p.sum() for log_p, _, _ in found).item() / tokens,
        "weight_mean": weights.mean().item(),
        "weight_min": weights.min().item(),
        "effective_sample_size": (weights.sum() ** 2 / (8 * (weights**2).sum())).item(),
        "token_accuracy": sum(hits.sum().item() for _, hits, _ in found) / tokens,
        "entropy": sum(entropy.sum().item() for _, _, entropy in found) / tokens,
        "num_target_tokens": tokens,
    }
    for name, value in wanted.items():
        assert log[name] == pytest.approx(value, rel=1e-5), name
    assert type(log["num_target_tokens"]) is int and type(log["num_tokens"]) is int
    assert log["num_tokens"] == sum(len(row["input_ids"]) for row in data)


def test_evaluation_is_over_the_whole_set_and_computes_metrics(tmp_path):
    data = rows(7)
    seen = {}

    def metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"own": 1.5}

    trainer = make(tmp_path, rows(4), eval_data=data, objective="convex", length_weighting="sequence", k=0.7,
                   per_device_eval_batch_size=3, given={"compute_metrics": metrics})  # fmt: skip
    result = trainer.evaluate()
    with torch.no_grad():
        means = torch.stack([log_p.mean() for log_p, _, _ in per_record(tiny_model(), data)])
    assert result["eval_loss"] == pytest.approx(((1 - (0.7 * means).exp()) / 0.7).mean().item(), rel=1e-5)
    assert result["eval_weight_mean"] == pytest.approx((0.7 * means).exp().mean().item(), rel=1e-5)
    assert result["eval_own"] == 1.5
    assert seen["logits"].shape[0] == 7 and seen["labels"].shape[0] == 7


def test_tied_embeddings_and_accumulation_of_a_model_that_takes_no_count(tmp_path):
    """As Gemma 3: `accepts_loss_kwargs` is False, and nothing is divided by the accumulation steps twice."""

    def tied(takes_count):
        model = tiny_model(tie_word_embeddings=True)
        model.accepts_loss_kwargs = takes_count
        return model

    data = rows(16, weights=True)
    whole = trained(tmp_path / "a", data, model=tied(True), per_device_train_batch_size=8)
    parts = trained(
        tmp_path / "b", data, model=tied(False), per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert whole.model.lm_head.weight is whole.model.model.embed_tokens.weight
    torch.testing.assert_close(logged(parts, "grad_norm"), logged(whole, "grad_norm"), rtol=1e-5, atol=0)
    assert_same_weights(parts, whole)


# -- nothing to learn from --------------------------------------------------------------------------------------------


def masked(row):
    return {**row, "labels": [-100] * len(row["labels"])}


SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("padding_free", [False, True])
def test_masked_rows_and_micro_batches_change_nothing(tmp_path, kind, padding_free):
    data = rows(8)
    hollow = [masked(row) for row in rows(8, seed=9)]
    layout = {**SKIP, **kind, "padding_free": padding_free, "max_length": None, "per_device_train_batch_size": 4}
    wanted, log = one_step(tmp_path / "a", data[:6], gradient_accumulation_steps=2, **layout)
    # A masked row, and a micro-batch of nothing else.
    mixed = [hollow[0], *data[:3], *hollow[1:5], *data[3:6], hollow[6]]
    got, mixed_log = one_step(tmp_path / "b", mixed, gradient_accumulation_steps=3, **layout)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7)
    for name in STATISTICS:
        assert mixed_log[name] == pytest.approx(log[name], rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("empty", ["labels", "weights"])
def test_a_batch_without_any_target_is_a_finite_zero(tmp_path, kind, empty):
    data = [masked(row) for row in rows(4)] if empty == "labels" else [{**row, "weight": 0.0} for row in rows(4)]
    if empty == "weights":  # a dataset would be refused
        data = Dataset.from_list(data).to_iterable_dataset()
    trainer = make(tmp_path, data, eval_data=data, max_steps=2, **SKIP, **kind)
    trainer.add_callback(MetricsFile())
    trainer.train()
    assert math.isnan(trainer.evaluate()["eval_loss"])  # there is none, and 0 would be the best
    assert not logged(trainer, "loss").any() and not logged(trainer, "grad_norm").any()
    for line in read_metrics(tmp_path)[:2]:
        assert all(line[name] == 0 for name in STATISTICS)
    before = tiny_model().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_adalora_adds_its_regulariser_once_a_step(tmp_path):
    """PEFT adds it to the loss of every forward pass."""
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "total_step": 9, "tinit": 1, "tfinal": 1}
    logs = []
    for accumulated in (1, 4):
        trainer = make(tmp_path, rows(8), max_steps=2, per_device_train_batch_size=8 // accumulated,
                       gradient_accumulation_steps=accumulated,
                       given={"peft_config": peft.AdaLoraConfig(**config)})  # fmt: skip
        trainer.train()
        logs.append({name: logged(trainer, name) for name in ("loss", "nll", "grad_norm")})
    for name, values in logs[0].items():
        torch.testing.assert_close(logs[1][name], values, rtol=1e-5, atol=0)
    assert trainer.model.peft_config["default"].orth_reg_weight == 0.5


def test_repetitions_are_found_in_training_after_an_evaluation(tmp_path, caplog):
    """A model stays in evaluation mode until the next step, whose batches come before it."""
    trainer = make(tmp_path, rows(5), per_device_train_batch_size=2)
    trainer._train_batch_size = 2
    trainer.accelerator = types.SimpleNamespace(
        num_processes=2, process_index=1, split_batches=False, gather=lambda x: x,
        # As in an epoch that was gone on with after a resume: the remainder is not known.
        gradient_state=types.SimpleNamespace(end_of_dataloader=True, remainder=-1),
    )  # fmt: skip
    batch = trainer.data_collator([{key: row[key] for key in ("input_ids", "labels")} for row in rows(2)])
    for mode in (True, False):
        trainer.model.train(mode)
        (got,), normalizer = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        assert normalizer == 0 and (got["labels"] == -100).all()  # the one record that is left is the other process's
    for _ in range(2):
        trainer._warn_of_a_stream(IterableDataset.from_generator(lambda: iter(rows(5))), "evaluation")
    assert caplog.text.count("The evaluation data are a stream, whose length is unknown") == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_single_target_token(tmp_path, kind):
    row = {"input_ids": [1, 7, 2], "labels": [-100, -100, 2]}
    grads, log = one_step(tmp_path, [row], **kind)
    with torch.no_grad():
        (log_p,) = per_record(tiny_model(), [row])[0][0].tolist()
    settings = {key: value for key, value in kind.items() if key != "objective"}
    objective = get_objective(kind["objective"], **settings)
    assert log["num_target_tokens"] == 1
    assert log["loss"] == pytest.approx(objective.value(torch.tensor(log_p)).item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in grads.values())


# -- what changes over a run ------------------------------------------------------------------------------------------


def test_k_warms_up_from_maximum_likelihood(tmp_path):
    """With a batch of all the data and a model that stands still, a step's statistics tell its k."""
    still = {"objective": "convex", "learning_rate": 0.0, "per_device_train_batch_size": 8}
    run = trained(tmp_path / "a", rows(8), k=1.0, k_warmup=0.5, max_steps=8, eval_data=rows(8), **still)
    with torch.no_grad():
        means = torch.stack([log_p.mean() for log_p, _, _ in per_record(tiny_model(), rows(8))])
    wanted = torch.stack([(min(1.0, step / 4) * means).exp().mean() for step in range(1, 9)])
    torch.testing.assert_close(logged(run, "weight_mean"), wanted, rtol=1e-5, atol=0)
    full_k = means.exp().mean().item()
    assert run.evaluate()["eval_weight_mean"] == pytest.approx(full_k, rel=1e-5)  # evaluation is at the full k
    slow = trained(tmp_path / "b", rows(8), k=1.0, k_warmup=1.0, max_steps=200, **still)
    assert logged(slow, "loss")[0] == pytest.approx(logged(slow, "nll")[0].item(), rel=0.02)
    assert logged(slow, "weight_mean")[-1] == pytest.approx(full_k, rel=1e-5)


@register_objective("test_root")
@dataclass(frozen=True, kw_only=True)
class Root(Objective):
    """A user's own: sqrt(1 + s u) - 1, for u = -m."""

    slope: float = 2.0

    def value(self, m):
        return (1 - self.slope * m).sqrt() - 1

    def weight(self, m):
        return self.slope / 2 / (1 - self.slope * m).sqrt()


def test_an_objective_of_the_users_own_by_name(tmp_path, capsys):
    from training_helpers import write_model_files, write_records

    model, data = write_model_files(tmp_path / "model"), write_records(tmp_path / "data.jsonl", 8)
    options = {"config_name": model, "tokenizer_name": model, "dataset": data, "max_steps": 2, "save_steps": 2}
    code = train(tmp_path / "run", "--json", objective="test_root", objective_kwargs='{"slope": 3.0}', **options)
    out = capsys.readouterr().out
    assert code == 0
    assert json.loads(out)["steps"] == 2 and out.count("\n") == 1  # one JSON object and nothing else on stdout
    settings = json.loads((tmp_path / "run" / "checkpoint-2" / "convexlm.json").read_text())["objective"]
    assert settings["name"] == "test_root" and settings["slope"] == 3.0
    assert train(tmp_path / "bad", objective="test_root", k=2.0, **options) == 2
    assert "test_root` has no setting `k`" in capsys.readouterr().err


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_script_shows_its_statistics_on_stderr_and_nothing_on_stdout(tmp_path, capfd, disable_tqdm):
    settings = {"disable_tqdm": disable_tqdm, "eval_strategy": "steps", "eval_steps": 3, "max_steps": 3}
    trainer = make(tmp_path, rows(8), eval_data=rows(3), logging_steps=1, **settings)
    trainer.train()
    said = capfd.readouterr()
    assert said.out == ""
    shown = [ast.literal_eval(line) for line in re.findall(r"\{'.*?\}", said.err)]
    history = trainer.state.log_history
    assert [{*line} for line in shown] == [{*line} - {"step", "total_flos"} for line in history] and len(shown) == 5
    assert shown[0]["nll"] == pytest.approx(history[0]["nll"], rel=1e-3)


def test_training_twice_starts_the_counts_again(tmp_path):
    trainer = make(tmp_path, rows(8), learning_rate=0.0, max_steps=3, logging_steps=2)
    trainer.train()
    first = copy.deepcopy(trainer.state.log_history[0])
    trainer.train()
    again = trainer.state.log_history[0]
    for name in (*STATISTICS, "num_tokens"):
        assert again[name] == pytest.approx(first[name]), name
