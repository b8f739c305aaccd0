"""The models that `benchmarks/decoding.py` decodes with: tiny Llamas that have learned the embedded corpus."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from convexlm.cli import main as convexlm
from convexlm.templates import get_template
from convexlm.tinyworld import records, sample_corpus
from convexlm.tinyworld.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {
    **{"model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3},
    **{
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
}


def train(name: str, folder: Path, steps: int, size: int = 30_000) -> Path:
    """The checkpoint of a model trained on `size` tinyworld pairs; trains it unless it is there.

    Args:
        name: `short prompt`, in which the fixed text of a prompt is a token a piece (13 tokens a prompt), or `long
            prompt`, in which it is spelled out in ordinary tokens (some 60, as a LLaMA tokenizer makes of it).
        folder: where it is trained.
        steps: optimizer steps, of 64 sentences.
        size: sentence pairs.
    """
    folder = folder / name.replace(" ", "-")
    output = folder / "out"
    if not (output / f"checkpoint-{steps}").is_dir():
        rows = records(sample_corpus("en-de", size, 1), "en-de")
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        texts = [row[key] for row in rows for key in ("input", "output")]
        if name == "short prompt":
            train_tokenizer(texts).save_pretrained(folder / "tokenizer")
        else:
            _spelling_tokenizer(texts, rows[0]["instruction"], folder / "tokenizer")
        where = ["--config_name", str(folder / "model"), "--tokenizer_name", str(folder / "tokenizer")]
        data = ["--dataset", str(folder / "train.jsonl"), "--output_dir", str(output), "--max_length", "128"]
        batch = ["--per_device_train_batch_size", "64", "--max_steps", str(steps), "--save_steps", str(steps)]
        rate = ["--learning_rate", "2e-3", "--warmup_steps", "30", "--lr_scheduler_type", "cosine"]
        rest = ["--gradient_checkpointing", "false", "--report_to", "none", "--json"]
        if convexlm(["train", *where, *data, *batch, *rate, *rest]):
            raise SystemExit("the training of the benchmark's model failed")
    return output / f"checkpoint-{steps}"


def _spelling_tokenizer(texts: list[str], instruction: str, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    prompt = get_template("alpaca").fill({"instruction": instruction, "input": "a"})
    tokenizer.train_from_iterator([*texts, *[prompt] * 50], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special).save_pretrained(
        folder
    )
