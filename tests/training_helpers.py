"""A tiny tokenizer, model and data for tests of training, and a way to train through the command line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from convexlm import cli
from convexlm.metrics_file import read_metrics

# For models this small more threads only wait for each other, for seconds a step where others use the machine too.
torch.set_num_threads(1)

WORDS = 44
STATISTICS = (
    "loss",
    "nll",
    "weight_mean",
    "weight_min",
    "effective_sample_size",
    "token_accuracy",
    "entropy",
    "num_target_tokens",
)


def tiny_tokenizer(chat_template=None):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i + 4 for i in range(WORDS - 4)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(**changes):
    settings = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes))


def rows(count, seed=0, weights=False, longest=9):
    """Tokenized records: `input_ids`, `labels` (-100 on the prompt), and a `weight` if asked for."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt, target = draw.randint(2, 6), draw.randint(1, longest)
        ids = [1, *(draw.randrange(4, WORDS) for _ in range(prompt + target)), 2]
        row = {"input_ids": ids, "labels": [-100] * (prompt + 1) + ids[prompt + 1 :]}
        if weights:
            row["weight"] = (1.0, 0.5, 2.0, 0.0, 1.5)[number % 5]
        made.append(row)
    return made


def write_records(path, count, seed=0, weights=False, longest=9):
    """The same as JSON Lines of prompt and completion."""
    lines = []
    for row in rows(count, seed, weights, longest):
        start = sum(label == -100 for label in row["labels"])
        spell = lambda ids: " ".join(f"w{i - 4}" for i in ids)  # noqa: E731
        record = {"prompt": spell(row["input_ids"][1:start]), "completion": spell(row["input_ids"][start:-1])}
        if weights:
            record["weight"] = row["weight"]
        lines.append(json.dumps(record))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_model_files(folder):
    """A tokenizer and a config of a new model, side by side in a folder."""
    tiny_tokenizer().save_pretrained(folder)
    tiny_config().save_pretrained(folder)
    return folder


# The steps are small, for where training is unstable float noise grows tenfold a step and no two splits would agree.
TRAIN = [
    *("--use_cpu", "true", "--report_to", "none", "--optim", "sgd", "--learning_rate", "0.05", "--seed", "1"),
    *("--lr_scheduler_type", "constant", "--max_length", "48", "--logging_steps", "1", "--max_steps", "20"),
    *("--save_steps", "20", "--gradient_checkpointing", "false", "--weight_decay", "0", "--bf16", "false"),
]


def words(*options, **settings):
    """Command-line words: `words("--resume", k=1)` is `["--resume", "--k", "1"]`."""
    made = [str(option) for option in options]
    for key, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        made += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return made


def train(output_dir, *options, **settings):
    """`convexlm train` in this process; returns its exit code. Options given here win over `TRAIN`."""
    return cli.main(["train", *TRAIN, *words(*options, output_dir=output_dir, **settings)])


class Run:
    """What a training run left in its folder."""

    def __init__(self, folder, step=20):
        self.folder = Path(folder)
        lines = read_metrics(folder)
        self.train = [line for line in lines if "loss" in line]
        self.eval = [line for line in lines if "eval_loss" in line]
        self.checkpoint = self.folder / f"checkpoint-{step}"
        (weights,) = self.checkpoint.glob("*model.safetensors")
        self.weights = load_file(weights)

    def column(self, name, prefix=""):
        lines = self.eval if prefix else self.train
        return torch.tensor([line[prefix + name] for line in lines], dtype=torch.float64)


def relative(got, wanted):
    """The largest difference, relative to the largest number."""
    assert got.shape == wanted.shape
    scale = wanted.abs().max().item() or 1.0
    return (got.double() - wanted.double()).abs().max().item() / scale


def environment():
    """Variables for a subprocess that imports the tests' helpers and uses one thread."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
