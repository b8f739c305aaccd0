"""Options whose result would not be what the objective promises are refused at the start, with the reason."""

from __future__ import annotations

import peft
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from trl import SFTConfig

from convexlm import ConvexConfig, ConvexTrainer
from convexlm.collator import ConvexCollator
from trainer_helpers import COMMON, assert_same_weights, logged, make, trained
from training_helpers import rows, tiny_model, tiny_tokenizer

# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ({"loss_type": "dft"}, "`objective` chooses the loss"),
    ({"label_smoothing_factor": 0.1}, "goes with `objective='mle'`"),
    ({"liger_kernel_config": {"fused_linear_cross_entropy": True}}, "would ignore the objective"),
    ({"accelerator_config": {"even_batches": False}}, "without a last batch"),
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
    heavy = Dataset.from_list(rows(4, weights=True))
    plain = DataCollatorForLanguageModeling(0)
    for evaluated in ({"a": Dataset.from_list(rows(4)), "b": heavy}, DatasetDict({"b": heavy})):
        with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` has a column `weight`"):
            make(tmp_path, rows(4), eval_data=evaluated, given={"data_collator": plain})
        make(tmp_path, rows(4), eval_data=evaluated)
    nameless = IterableDataset.from_generator(lambda: iter(rows(4, weights=True)))
    with pytest.raises(ValueError, match="`train_dataset` has a column `weight`"):
        make(tmp_path, nameless, given={"data_collator": plain})
    with pytest.raises(ValueError, match="let your `data_collator` pad left"):
        make(tmp_path, rows(4), padding_side="left", given={"data_collator": DataCollatorForLanguageModeling(0)})
    make(tmp_path, rows(4, weights=True), given={"data_collator": ConvexCollator(0)})
    with pytest.raises(ValueError, match="must be a ConvexConfig"):
        make(tmp_path, rows(4), config=SFTConfig)


def test_data_without_a_record_or_a_target_are_refused(tmp_path):
    whole, empty = Dataset.from_list(rows(4)), Dataset.from_list(rows(4)).select([])
    for data, evaluated, name in (
        (empty, None, "train_dataset"),
        (whole, empty, "eval_dataset"),
        (whole, {"own": empty}, r"eval_dataset\['own'\]"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is empty"):
            make(tmp_path, data, eval_data=evaluated)
    with pytest.raises(ValueError, match="the train dataset is empty: give a larger `max_length`"):
        make(tmp_path, rows(4), max_length=2)


def test_a_collator_that_gives_no_labels_is_told_so(tmp_path):
    trainer = make(tmp_path, rows(4), given={"data_collator": lambda examples: {"input_ids": torch.ones(4, 3).long()}})
    for use in (trainer.train, lambda: trainer.evaluate(Dataset.from_list(rows(4)))):
        with pytest.raises(ValueError, match=r"the batch has no `labels` \(it has input_ids\); your `data_collator`"):
            use()


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_model_is_not_trained_in_vain(tmp_path, checkpointing):
    """With checkpointing its inputs ask for gradients, and nothing would fail."""
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    trainer = make(tmp_path, rows(4), eval_data=rows(4), model=frozen, gradient_checkpointing=checkpointing)
    trainer.evaluate()
    with pytest.raises(ValueError, match="no parameter to train, .*`is_trainable=True`"):
        trainer.train()
