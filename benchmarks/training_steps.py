"""Trainers that `training.py` times: the same model, records, batches and optimizer, with one loss or another.

LLaMA-7B's shape on a GPU has bf16 weights, and so bf16 gradients and AdamW states: 13.5, 13.5 and 27 GB, where float32
ones would take 108 GB and not fit an 80 GB card. That is a shape to time, not a recipe to train by. Layers are
recomputed in the backward pass there, for every candidate.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ["reference", "trl-nll", "trl-dft", "convexlm-mle", "convexlm-convex"]
LAYOUTS = {"padded": NAMES, "packed": ["trl-nll", "convexlm-mle", "convexlm-convex"]}
SHAPES = {
    "58m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 12},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
ROW = 512


def run(settings: dict[str, Any], wait: Callable[[], bool], report: Callable[[dict[str, Any]], None]) -> None:
    """Train; before every optimizer step `wait()` for a turn, after it `report` its seconds and tokens."""
    torch.manual_seed(0)
    model = _model(settings["model"], settings["device"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(settings, model, _dataset(settings), folder)
        counts = {"tokens": 0, "targets": 0, "places": 0}
        rate = _matrix_rate() if settings["device"] == "cuda" else None
        work = _operations_per_place(model, recomputed=settings["model"] == "7b", lora=settings["lora"])
        step = trainer.training_step

        def counted_step(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            counts["tokens"] += int(seen.sum())
            counts["targets"] += int((inputs["labels"][:, 1:] != -100).sum())
            counts["places"] += inputs["labels"].numel()
            return step(model, inputs, *args)

        trainer.training_step = counted_step

        class Clock(TrainerCallback):
            begin = 0.0

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if not wait():
                    raise SystemExit
                counts.update(tokens=0, targets=0, places=0)
                _synchronize()
                self.begin = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                _synchronize()
                seconds = time.perf_counter() - self.begin
                share = {} if rate is None else {"matrix_share": work * counts["places"] / seconds / rate}
                report({"seconds": seconds, **counts, **share})

        trainer.add_callback(Clock())
        trainer.train()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _matrix_rate() -> float:
    """Operations a second of a large bf16 product on the GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(6):
        _synchronize()
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        _synchronize()
        seconds.append((time.perf_counter() - begin) / 4)
    return float(2 * 8192**3 / min(seconds[1:]))


def _operations_per_place(model: Any, *, recomputed: bool, lora: bool) -> float:
    """Operations of a step's matrix products a place of the batch, attention's left out: 2 a weight and pass.

    Three passes in training (two if the weights are frozen), one more where layers are recomputed. The head is counted
    at every place, though convexlm's works on targets only.
    """
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return 2.0 * weights * ((2 if lora else 3) + recomputed)


def _model(shape: str, device: str) -> Any:
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, pad_token_id=0, **SHAPES[shape])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if shape == "7b" and device == "cuda" else before)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def _dataset(settings: dict[str, Any]) -> Any:
    from convexlm.instructions import load_records
    from convexlm.tokenization import PromptSettings, build_dataset, tokenize_records
    from convexlm.tokenizer_files import load_tokenizer

    data = Path(settings["data"])
    tokenizer = load_tokenizer(data / "tokenizers" / "tokenizer.model")
    # A packed row holds about four records.
    per_step = settings["batch"] if settings["layout"] == "padded" else 4 * settings["rows"]
    records = load_records(data / "alpaca" / "alpaca_cleaned_51924.json.gz", max_records=per_step * settings["steps"])
    tokenized = tokenize_records(records, tokenizer, PromptSettings().resolve(tokenizer), max_length=ROW)
    dataset = build_dataset(tokenized)
    return dataset.select_columns(["input_ids", "labels"])


def _trainer(settings: dict[str, Any], model: Any, dataset: Any, folder: str) -> Any:
    from trl import SFTConfig, SFTTrainer

    from convexlm import ConvexConfig, ConvexTrainer
    from convexlm.tokenizer_files import load_tokenizer

    packed = settings["layout"] == "packed"
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": settings["rows"] if packed else settings["batch"],
        "max_steps": settings["steps"],
        "use_cpu": settings["device"] == "cpu",
        "bf16": settings["bf16"],
        "gradient_checkpointing": settings["model"] == "7b",
        "optim": settings["optim"],
        "learning_rate": 1e-4,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
        "max_length": ROW,
        "packing": packed,
    }
    tokenizer = load_tokenizer(Path(settings["data"]) / "tokenizers" / "tokenizer.model")
    given: dict[str, Any] = {"model": model, "train_dataset": dataset, "processing_class": tokenizer}
    if settings["lora"]:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    kind, _, loss = settings["candidate"].partition("-")
    if kind == "convexlm":
        return ConvexTrainer(args=ConvexConfig(objective=loss, **common), **given)
    if kind == "trl":
        return SFTTrainer(args=SFTConfig(loss_type=loss, **common), **given)

    class ReferenceTrainer(SFTTrainer):
        """The formula over full logits: -sum_i T_i exp(mean log-probability of i) / tokens of the micro-batch."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs["labels"][:, 1:]
            logits = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False).logits
            mask = labels != -100
            log_probs = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
            lengths = mask.sum(1)
            means = (log_probs * mask).sum(1) / lengths.clamp(min=1)
            return -(lengths * means.exp()).sum() / mask.sum()

    return ReferenceTrainer(args=SFTConfig(**common), **given)
