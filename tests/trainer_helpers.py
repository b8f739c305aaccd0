"""Making and running a `ConvexTrainer` on a tiny model, and what its numbers should be from the full logits."""

from __future__ import annotations

import torch
from datasets import Dataset

from convexlm import ConvexConfig, ConvexTrainer
from training_helpers import tiny_model, tiny_tokenizer

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


KINDS = [
    {"objective": "mle"},
    {"objective": "convex"},
    {"objective": "convex", "length_weighting": "sequence"},
    {"objective": "power"},
    {"objective": "dft"},
]


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
