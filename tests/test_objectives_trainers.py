"""`as_compute_loss_func` in a plain transformers Trainer, and DFT against TRL's own."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from convexlm.objectives import get_objective
from objective_oracle import ids_of

VOCABULARY = 32
CASES = [
    get_objective("mle"),
    get_objective("convex", k=1.0),
    get_objective("convex", k=2.0, length_weighting="sequence", mle_mix=0.1),
    get_objective("power", k=0.5),
    get_objective("dft"),
    get_objective("dft", length_weighting="sequence"),
]


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def records(n=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        prompt, target = torch.randint(1, 6, (2,), generator=generator).tolist()
        ids = torch.randint(1, VOCABULARY, (prompt + target,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows):
    length = max(len(r["input_ids"]) for r in rows)
    pad = lambda key, value: torch.tensor([r[key] + [value] * (length - len(r[key])) for r in rows])  # noqa: E731
    ids = pad("input_ids", 0)
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": (ids != 0).long()}


def expected_loss(objective, model, rows):
    """From each record alone, without padding."""
    log_probs, ids = [], []
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                log_probs.append((logits[position] - logits[position].logsumexp(-1))[label].item())
                ids.append(i)
    every = torch.ones(len(ids), dtype=torch.bool)
    return objective(torch.tensor(log_probs, dtype=torch.float64), every, sequence_ids=torch.tensor(ids)).loss.item()


def train(objective, tmp_path, batch, accumulation, steps=2, **arguments):
    model = tiny_llama()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=records(),
        eval_dataset=records(8, seed=2),
        data_collator=collate,
        compute_loss_func=objective.as_compute_loss_func(sequences_per_batch=8),
    )
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return trainer, logs


@pytest.mark.parametrize("objective", CASES, ids=ids_of)
def test_a_plain_trainer_gives_the_same_numbers_however_it_accumulates(objective, tmp_path):
    whole, logs = train(objective, tmp_path, 8, 1)
    split, split_logs = train(objective, tmp_path, 2, 4)
    assert len(logs) == 2
    assert logs[0][0] == pytest.approx(expected_loss(objective, tiny_llama(), records()[:8]), rel=1e-5)
    torch.testing.assert_close(torch.tensor(split_logs), torch.tensor(logs), rtol=1e-5, atol=1e-7)
    before = tiny_llama().state_dict()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(before[name], value) for name, value in whole.model.state_dict().items())
    wanted = expected_loss(objective, whole.model.eval(), records(8, seed=2))
    assert whole.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def example(dtype=torch.float32):
    torch.manual_seed(3)
    logits = torch.randn(3, 6, VOCABULARY, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (3, 6))
    labels[0, :3] = labels[1, 5:] = -100
    return logits, labels


@pytest.mark.parametrize("objective", CASES, ids=ids_of)
def test_logits_and_labels_give_the_loss_of_their_log_probabilities(objective):
    logits, labels = example(torch.float64)
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
    wanted = objective(log_probs, labels[:, 1:] != -100)
    compute_loss = objective.as_compute_loss_func()
    loss = compute_loss({"logits": logits}, labels)
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(compute_loss((logits,), labels), loss, rtol=0, atol=0)
    for got, want in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(wanted.loss, logits), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


def test_half_precision_logits_give_a_float32_loss():
    logits, labels = example(torch.bfloat16)
    compute_loss = get_objective("convex").as_compute_loss_func()
    loss = compute_loss({"logits": logits}, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, compute_loss({"logits": logits.float()}, labels), rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_logits_of_positions_without_target_do_not_leak():
    logits, labels = example()
    spoilt = logits.detach().clone()
    spoilt[0, :2] = float("nan")
    spoilt[:, -1] = float("inf")
    spoilt.requires_grad_()
    compute_loss = get_objective("convex").as_compute_loss_func()
    loss = compute_loss({"logits": spoilt}, labels)
    torch.testing.assert_close(loss, compute_loss({"logits": logits}, labels), rtol=0, atol=0)
    assert torch.autograd.grad(loss, spoilt)[0].isfinite().all()
    nothing = compute_loss({"logits": spoilt}, torch.full_like(labels, -100), num_items_in_batch=torch.tensor(0))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, spoilt)[0].any()


def test_normalizers_of_a_plain_trainer():
    logits, labels = example()
    token = get_objective("convex").as_compute_loss_func()
    own = token({"logits": logits}, labels)
    count = int((labels[:, 1:] != -100).sum())
    for given in (2 * count, torch.tensor(2 * count), torch.tensor([2 * count])):
        torch.testing.assert_close(token({"logits": logits}, labels, num_items_in_batch=given), own / 2)
    sequence = get_objective("convex", length_weighting="sequence")
    with pytest.raises(ValueError, match="sequences_per_batch"):
        sequence.as_compute_loss_func()({"logits": logits}, labels, num_items_in_batch=count)
    own = sequence.as_compute_loss_func()({"logits": logits}, labels)
    counted = sequence.as_compute_loss_func(sequences_per_batch=6)
    torch.testing.assert_close(counted({"logits": logits}, labels, num_items_in_batch=count), own / 2)
    torch.testing.assert_close(counted({"logits": logits}, labels), own)
    with torch.no_grad():  # evaluation, in which the Trainer passes a count of tokens too
        torch.testing.assert_close(counted({"logits": logits}, labels, num_items_in_batch=count), own)
    with pytest.raises(ValueError, match="sequences_per_batch"):
        sequence.as_compute_loss_func(sequences_per_batch=0)
    with pytest.raises(ValueError, match="labels"):
        token({"logits": logits}, None)


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="w0", eos_token="w2", unk_token="w1"
    )


def test_dft_has_the_loss_gradient_of_trl(tmp_path):
    """TRL's DFT loss is -p log p with p held constant; its gradient is that of token-level convex with k = 1."""
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    rows = records(8)
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(output_dir=str(tmp_path), loss_type="dft", report_to=[], use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    batch = collate(rows)
    for normalizer in (None, torch.tensor(50)):
        model = trainer.model.train()
        model.zero_grad()
        trainer.compute_loss(model, copy.copy(batch), num_items_in_batch=normalizer).backward()
        theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        # TRL patches the model's forward; ours is the model as transformers makes it.
        own = tiny_llama().train()
        outputs = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        get_objective("dft").as_compute_loss_func()(outputs, batch["labels"], num_items_in_batch=normalizer).backward()
        assert theirs and any(g.abs().max() > 1e-3 for g in theirs.values())
        for name, parameter in own.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-6)


def _evaluate_on_a_rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    logits, labels = example(torch.float64)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)  # of different lengths, and on rank 0 fewer
    count = (labels[:, 1:] != -100).sum()
    objective = get_objective("convex", length_weighting="sequence")
    with torch.no_grad():
        loss = objective.as_compute_loss_func()({"logits": logits[mine]}, labels[mine], num_items_in_batch=count)
        loss = loss * 2  # as the Trainer does, whose metric is then the mean over ranks
        torch.distributed.all_reduce(loss)
        whole = objective.as_compute_loss_func()({"logits": logits}, labels)
        torch.testing.assert_close(loss / 2, whole, rtol=1e-12, atol=0)
        local = (labels[mine, 1:] != -100).sum()  # average_tokens_across_devices=False: every rank for itself
        alone = objective.as_compute_loss_func()({"logits": logits[mine]}, labels[mine], num_items_in_batch=local)
        log_probs = logits[mine, :-1].log_softmax(-1).gather(-1, labels[mine, 1:, None].clamp(min=0)).squeeze(-1)
        torch.testing.assert_close(alone, objective(log_probs, labels[mine, 1:] != -100).loss, rtol=1e-12, atol=0)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_evaluation_over_two_ranks_counts_sequences_over_both(tmp_path):
    torch.multiprocessing.spawn(_evaluate_on_a_rank, args=(str(tmp_path),), nprocs=2)
