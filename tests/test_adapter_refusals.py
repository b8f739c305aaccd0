"""Adapters of PEFT that would not be what they promise are refused, at the start or at loading; others are right."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from convexlm.decoding.checkpoint import check_checkpoint
from convexlm.decoding.loading import load_model
from convexlm.errors import UserError
from convexlm.export import export_checkpoint
from trainer_helpers import make
from training_helpers import rows, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 5, 9, 20, 6, 7, 33, 12]])


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)


def prefix(**options: Any) -> peft.PrefixTuningConfig:
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)


def noisy(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def saved(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A base model on the disk."""
    if not folder.exists():
        tiny_model(**(changes or {})).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def based(folder: Path, config: Any, changes: dict[str, Any] | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved(folder, changes))
    return noisy(peft.get_peft_model(base, config))


REFUSED = [
    (
        lambda: prefix(),
        {"gradient_checkpointing": True},
        "PREFIX_TUNING: PEFT recomputes .*gradient_checkpointing=False",
    ),
    (lambda: prefix(), {"gradient_checkpointing": False, "padding_free": True}, "drops the `position_ids`.*packing"),
    (lambda: prefix(), {"gradient_checkpointing": False, "padding_side": "left"}, "`padding_side='right'`"),
    (
        lambda: lora(alora_invocation_tokens=[9]),
        {"padding_free": True},
        "looks for `alora_invocation_tokens` once a row",
    ),
    (lambda: peft.LilyConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), {}, "averages over all tokens"),
    (lambda: peft.ShadowConfig(task_type="CAUSAL_LM", r=4), {}, "auxiliary_loss_weight=0"),
    (
        lambda: lora(monteclora_config=peft.MontecloraConfig(num_samples=2)),
        {"gradient_checkpointing": True},
        "random numbers; use `gradient_check",
    ),
    (lambda: lora(init_lora_weights="pissa_niter_4"), {}, "out of the base model, otherwise at every loading"),
    (lambda: peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), {}, "`task_ids` with every batch"),
    (
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
        "`load_best_model_at_end` would give another model: PEFT saves what the encoder",
    ),
]


@pytest.mark.parametrize(("config", "options", "told"), REFUSED, ids=[told[:24] for *_, told in REFUSED])
def test_refused_at_the_start(config: Any, options: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(), config())
    eval_data = rows(4) if "eval_strategy" in options else None
    with pytest.raises(ValueError, match=told):
        make(tmp_path, rows(8), model=model, eval_data=eval_data, **options)


ALLOWED = [
    (lambda: prefix(), {"gradient_checkpointing": False}),
    (lambda: lora(alora_invocation_tokens=[9]), {}),
    (lambda: peft.ShadowConfig(task_type="CAUSAL_LM", r=4, auxiliary_loss_weight=0.0), {}),
    (lambda: lora(monteclora_config=peft.MontecloraConfig(num_samples=2)), {"gradient_checkpointing": False}),
    (lambda: lora(init_lora_weights="pissa"), {}),
]


@pytest.mark.parametrize(("config", "options"), ALLOWED)
def test_the_way_out_that_is_told_trains(config: Any, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make(tmp_path, rows(8), model=peft.get_peft_model(tiny_model(), config()), max_steps=1, **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_mixed_adapters_are_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(), lora(), mixed=True)
    with pytest.raises(ValueError, match="PeftMixedModel"):
        make(tmp_path, rows(8), model=model)


def test_what_peft_leaves_to_the_user_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, init_r=4, target_r=2)
    with caplog.at_level(logging.WARNING, "convexlm.adapter_refusals"):
        make(tmp_path, rows(8), model=peft.get_peft_model(tiny_model(), config))
    assert "kind ADALORA: nobody calls `update_and_allocate`" in caplog.text


@pytest.mark.parametrize("objective", [{"objective": "mle"}, {"objective": "convex", "k": 1.0}])
def test_adaption_prompt_has_pefts_loss(objective: dict[str, Any], tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
    model = noisy(peft.get_peft_model(tiny_model(attn_implementation="eager"), config))
    one = {"input_ids": [1, 5, 9, 20, 6, 7], "labels": [-100, -100, 9, 20, 6, 7]}
    from datasets import Dataset

    trainer = make(
        tmp_path,
        Dataset.from_list([one]),
        model=model,
        max_steps=1,
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        **objective,
    )
    peft_model = trainer.model
    trainer.train()
    ids = torch.tensor([one["input_ids"]])
    with torch.no_grad():
        found = peft_model.eval()(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    mean = found[0, 1:-1].gather(1, ids[0, 2:, None]).mean()
    wanted = -mean if objective["objective"] == "mle" else 1 - mean.exp()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_predictions_are_those_of_the_batch_where_there_are_virtual_tokens(tmp_path: Path) -> None:
    from datasets import Dataset

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = noisy(peft.get_peft_model(tiny_model(), config))
    one = {"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}
    seen = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["logits"], seen["labels"] = torch.as_tensor(prediction.predictions), prediction.label_ids
        return {}

    trainer = make(tmp_path, Dataset.from_list([one]), model=model, given={"compute_metrics": metrics})
    trainer.predict(Dataset.from_list([one]))
    assert seen["logits"].shape[:2] == seen["labels"].shape == IDS.shape
    torch.testing.assert_close(seen["logits"].float(), logits(trainer.model)[:, 4:], rtol=1e-4, atol=1e-4)


def test_p_tuning_is_not_gone_on_from(tmp_path: Path) -> None:
    def trainer() -> Any:
        config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
        model = peft.get_peft_model(tiny_model(), config)
        return make(tmp_path, rows(12), model=model, max_steps=2, save_strategy="steps", save_steps=1)

    trainer().train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-1: cannot be gone on from: PEFT saves what the encoder"):
        trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {}], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "trained",
    [
        [5, 6, 7],
        {"lm_head": [5, 6, 7]},
        {"embed_tokens": [5, 6], "lm_head": [7, 8]},
        {"embed_tokens": [5, 6], "lm_head": [5, 6]},
        "whole",
    ],
    ids=str,
)
def test_trained_tokens_are_merged_right_or_not_at_all(changes: dict[str, Any], trained: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if trained == "whole":
        config: Any = peft.TrainableTokensConfig(
            task_type="CAUSAL_LM", token_indices=[5, 6, 7], target_modules=["lm_head"]
        )
    else:
        config = lora(trainable_token_indices=trained)
    model = based(tmp_path / "base", config, changes)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    try:
        export_checkpoint(tmp_path / "adapter", tmp_path / "merged", merge_adapter=True)
    except UserError as error:
        assert "shares its weight with" in str(error) and changes
        return
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((merged - wanted).abs().max() / wanted.std()) < 1e-4


def test_several_adapters_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    model = based(tmp_path / "base", lora())
    model.add_adapter("second", lora())
    model.save_pretrained(tmp_path / "both")
    tiny_tokenizer().save_pretrained(tmp_path / "both")
    for refuse in (check_checkpoint, lambda folder: export_checkpoint(folder, tmp_path / "out", merge_adapter=True)):
        with pytest.raises(UserError, match=r"holds several adapters \(its own, second\)"):
            refuse(tmp_path / "both")
    shutil.move(tmp_path / "both" / "second", tmp_path / "both" / "checkpoint-2")
    check_checkpoint(tmp_path / "both")  # the end of a training, with its checkpoints


def test_an_adapter_under_its_name_is_pointed_to(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model(), lora(), adapter_name="mine")
    model.save_pretrained(tmp_path / "adapter")
    for refuse in (check_checkpoint, lambda folder: export_checkpoint(folder, tmp_path / "out", merge_adapter=True)):
        with pytest.raises(UserError, match="did you mean .*adapter/mine"):
            refuse(tmp_path / "adapter")


def test_adapters_on_another_base_than_they_were_trained_on(tmp_path: Path) -> None:
    model = based(tmp_path / "base", lora(init_lora_weights="pissa_niter_4"))
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="pissa_niter_4.*path_initial_model_for_weight_conversion"):
        load_model(tmp_path / "adapter", "cpu", torch.float32)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": True}))
    load_model(tmp_path / "adapter", "cpu", torch.float32)


def test_pruned_adalora_is_loaded(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        total_step=6,
        init_r=6,
        target_r=2,
        tinit=1,
        tfinal=2,
    )
    model = based(tmp_path / "base", config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(6):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    found = logits(load_model(tmp_path / "adapter", "cpu", torch.float32))
    assert float((found - wanted).abs().max() / wanted.std()) < 1e-4
