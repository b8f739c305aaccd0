"""`ConvexTrainer` held against TRL's trainer, against formulas on full logits, and against hostile batches."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from convexlm import ConvexConfig, ConvexTrainer, get_objective
from convexlm.collator import ConvexCollator
from convexlm.metrics_file import MetricsFile, read_metrics
from convexlm.objectives import Objective, register_objective
from training_helpers import STATISTICS, rows, tiny_model, tiny_tokenizer, train

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_length": 48,
    "seed": 3,
}


def make(folder, data, model=None, eval_data=None, cls=ConvexTrainer, config=ConvexConfig, given=None, **settings):
    as_dataset = lambda d: Dataset.from_list(d) if isinstance(d, list) else d  # noqa: E731
    return cls(
        model=model or tiny_model(),
        args=config(output_dir=str(folder), **{**COMMON, **settings}),
        train_dataset=as_dataset(data),
        eval_dataset=as_dataset(eval_data),
        processing_class=tiny_tokenizer(),
        **(given or {}),
    )


def trained(folder, data, **settings):
    trainer = make(folder, data, **settings)
    trainer.train()
    return trainer


def logged(trainer, name):
    values = [line[name] for line in trainer.state.log_history if name in line]
    return torch.tensor(values, dtype=torch.float64)


def assert_same_weights(got, wanted, rtol=1e-5, atol=1e-6):
    theirs = wanted.model.state_dict()
    for name, value in got.model.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol)


def one_step(folder, data, **settings):
    """Gradients and logged statistics of a first step in which nothing moves."""
    trainer = make(folder, data, max_steps=1, learning_rate=0.0, **settings)
    kept = {}

    def keep(*_args, **_kwargs):
        kept.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.callback_handler.callbacks[0].on_pre_optimizer_step = keep
    trainer.train()
    return kept, trainer.state.log_history[0]


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


def test_load_balancing_loss_is_scaled_as_trl_does(tmp_path):
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

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 4}
    ours = trained(tmp_path / "ours", rows(14), model=mixture(), objective="mle", **settings)
    theirs = make(tmp_path / "trl", rows(14), model=mixture(), cls=SFTTrainer, config=SFTConfig, **settings)
    theirs.train()
    for name in ("loss", "grad_norm", "aux_loss"):
        torch.testing.assert_close(logged(ours, name), logged(theirs, name), rtol=1e-5, atol=0)
    assert_same_weights(ours, theirs)
    assert (logged(ours, "loss") - logged(ours, "nll") > 0.1).all()  # the auxiliary loss is in the one only


# -- against formulas -------------------------------------------------------------------------------------------------


def per_record(model, data):
    """Target log-probabilities, hits and entropies of each record alone, from the full logits in float64."""
    found = []
    for row in data:
        places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        log_p = logits.log_softmax(-1)[[t - 1 for t in places]]
        targets = torch.tensor([row["labels"][t] for t in places])
        hits = log_p.argmax(-1) == targets
        found.append((log_p.gather(1, targets[:, None])[:, 0], hits, -(log_p.exp() * log_p).sum(-1)))
    return found


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
KINDS = [
    {"objective": "mle"},
    {"objective": "convex"},
    {"objective": "convex", "length_weighting": "sequence"},
    {"objective": "power"},
    {"objective": "dft"},
]


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
    trainer = make(tmp_path, data, eval_data=data, max_steps=2, **SKIP, **kind)
    trainer.add_callback(MetricsFile())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == 0
    assert not logged(trainer, "loss").any() and not logged(trainer, "grad_norm").any()
    for line in read_metrics(tmp_path)[:2]:
        assert all(line[name] == 0 for name in STATISTICS)
    before = tiny_model().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


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


def test_training_prints_nothing_on_stdout(tmp_path, capfd):
    trainer = make(tmp_path, rows(8), eval_data=rows(3), disable_tqdm=False, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert capfd.readouterr().out == ""


def test_training_twice_starts_the_counts_again(tmp_path):
    trainer = make(tmp_path, rows(8), learning_rate=0.0, max_steps=3, logging_steps=2)
    trainer.train()
    first = copy.deepcopy(trainer.state.log_history[0])
    trainer.train()
    again = trainer.state.log_history[0]
    for name in (*STATISTICS, "num_tokens"):
        assert again[name] == pytest.approx(first[name]), name


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ({"loss_type": "dft"}, "`objective` chooses the loss"),
    ({"label_smoothing_factor": 0.1}, "needs the full logits"),
    ({"liger_kernel_config": {"fused_linear_cross_entropy": True}}, "would ignore the objective"),
    ({"average_tokens_across_devices": False}, "normalised over the global batch"),
    ({"padding_side": "left", "padding_free": True, "max_length": None}, "no meaning without padding"),
    ({"padding_side": "left", "packing": True}, "no meaning without padding"),
    ({"eval_packing": True}, "needs `padding_free=True`"),
    ({"packing": True, "max_length": None}, "max_length"),
    ({"assistant_only_loss": True}, "chat template"),
    *[
        ({"packing": True, "packing_strategy": strategy, **kind}, r"`packing_strategy='bfd'`.*or `padding_free=True`")
        for strategy in ("bfd_split", "wrapped")
        for kind in (
            {"objective": "convex"},
            {"objective": "power"},
            {"objective": "mle", "length_weighting": "sequence"},
            {"objective": "dft", "length_weighting": "sequence"},
        )
    ],
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("weights", [False, True])
def test_what_cannot_be_honoured_is_refused_at_the_start(tmp_path, settings, reason, weights):
    with pytest.raises(ValueError, match=reason) as caught:
        make(tmp_path, rows(4, weights=weights), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
@pytest.mark.parametrize("objective", ["mle", "dft"])
def test_packing_that_cuts_is_allowed_where_it_changes_nothing(tmp_path, strategy, objective):
    run = trained(tmp_path, rows(12, longest=20), packing=True, packing_strategy=strategy, max_length=16,
                  objective=objective)  # fmt: skip
    assert logged(run, "loss").isfinite().all() and len(logged(run, "loss")) == COMMON["max_steps"]


def test_arguments_that_would_replace_the_objective_or_lose_the_weights_are_refused(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    with pytest.raises(ValueError, match="register an objective"):
        make(tmp_path, rows(4), given={"compute_loss_func": lambda *a, **k: None})
    with pytest.raises(ValueError, match="a column `weight`"):
        make(tmp_path, rows(4, weights=True), given={"data_collator": DataCollatorForLanguageModeling(0)})
    with pytest.raises(ValueError, match="let your `data_collator` pad left"):
        make(tmp_path, rows(4), padding_side="left", given={"data_collator": DataCollatorForLanguageModeling(0)})
    make(tmp_path, rows(4, weights=True), given={"data_collator": ConvexCollator(0)})
    with pytest.raises(ValueError, match="must be a ConvexConfig"):
        make(tmp_path, rows(4), config=SFTConfig)


def test_assistant_only_loss_needs_marks_in_the_chat_template(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    data = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}] * 4
    )
    config = ConvexConfig(output_dir=str(tmp_path), **COMMON, assistant_only_loss=True)
    for chat_template, reason in ((None, "has no chat template"), (template, "(?i)chat template")):
        with pytest.raises(ValueError, match=reason):
            ConvexTrainer(
                model=tiny_model(), args=config, train_dataset=data, processing_class=tiny_tokenizer(chat_template)
            )
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
        "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    trainer = ConvexTrainer(
        model=tiny_model(), args=config, train_dataset=data, processing_class=tiny_tokenizer(marked)
    )
    labels = trainer.train_dataset[0]["labels"]
    assert labels[:2] == [-100, -100] and labels[2:] == [7, 2]


def test_padding_free_cuts_at_max_length(tmp_path):
    """TRL asks for `max_length=None` here; the limit is enforced in preparation like everywhere else."""
    data = rows(8, longest=20)
    trainer = make(tmp_path, data, eval_data=data, padding_free=True, max_length=12)
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 12
    assert max(len(row["input_ids"]) for row in trainer.eval_dataset) == 12
    assert trainer.args.max_length == 12
    wanted = trained(tmp_path, data, max_length=12)
    trainer.train()
    assert_same_weights(trainer, wanted)
