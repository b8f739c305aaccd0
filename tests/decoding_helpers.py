"""A tiny checkpoint whose answers end, and a backend that needs no model, for the tests of decoding."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from convexlm.decoding import DecodeJob, Search, decode_jobs
from convexlm.decoding import run as run_module
from convexlm.decoding.backends import Backend, Hypothesis, register_backend
from convexlm.testsets import TestSet
from convexlm.tokenization import PromptSettings, encode_prompt, encode_record

if TYPE_CHECKING:
    import pytest

WORDS = "the small dog sees a red house and my old cat sleeps near your green tree"
SOURCES = [
    "the dog sees",
    "",
    "a red house and the small cat near my old tree and your green dog sees the house",
    "my cat sleeps near your tree",
    "house",
    "the old dog and the old cat and the old house",
    "a tree near a house near a dog",
    "sees sleeps sees sleeps sees sleeps",
    "your small green house",
]


def make_test_set(sources: list[str] = SOURCES, name: str = "tiny", pair: str = "en-de") -> TestSet:
    return TestSet(name, pair, sources, [], [str(number) for number in range(len(sources))])


def make_job(output_file: Path, sources: list[str] = SOURCES, **options: Any) -> DecodeJob:
    settings = PromptSettings(add_bos=options.pop("add_bos", None))
    return DecodeJob(make_test_set(sources), Search(**options), output_file, settings)


def make_tokenizer(pad: bool = True) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*make_job(Path("x.jsonl")).prompts(), WORDS] * 3, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_checkpoint(folder: Path, *, steps: int = 120, max_positions: int = 512, heads: int = 4) -> Path:
    """A two-layer Llama that has learned to answer with some of the source's words and then EOS."""
    import random

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from convexlm.instructions import Record

    torch.manual_seed(0)
    chance = random.Random(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=max_positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config)
    settings = PromptSettings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = []
        for _ in range(8):
            words = chance.choices(WORDS.split(), k=chance.randint(0, 9))
            prompt = make_job(Path("x.jsonl"), [" ".join(words)]).prompts()[0]
            answer = " ".join(words[: chance.randint(0, 6)])
            rows.append(encode_record(tokenizer, Record(prompt=prompt, completion=answer), settings))
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), 3)
        labels = torch.full((len(rows), width), -100)
        for row, (prompt, answer) in enumerate(rows):
            both = torch.tensor(prompt + answer)
            ids[row, : len(both)] = both
            labels[row, len(prompt) : len(both)] = both[len(prompt) :]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(folder)
    return folder


def prompt_ids(checkpoint: Path, job: DecodeJob) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [encode_prompt(tokenizer, prompt, job.settings) for prompt in job.prompts()]


@register_backend("echo")
@dataclass
class EchoBackend(Backend):
    """Answers with given texts, or the prompt's hash; runs out of memory above `memory` sentences."""

    texts: dict[int, str] = field(default_factory=dict)
    memory: int = 10**9
    delay: ClassVar[float] = 0.0
    loads: int = 0
    sizes: list[int] = field(default_factory=list)
    max_length: int | None = None

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        self.loads += 1

    def encode(self, prompts: Any, settings: PromptSettings) -> list[list[int]]:
        return [list(prompt.encode()) for prompt in prompts]

    def generate(self, prompts: Any, search: Search) -> list[Hypothesis]:
        import time

        if len(prompts) > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sizes.append(len(prompts))
        time.sleep(self.delay)
        # The composition of the batch shows in the score, as it does in the last bits of a real one.
        return [Hypothesis([sum(prompt), len(prompt)], -len(prompts) - 0.1, True) for prompt in prompts]

    def text(self, hypothesis: Hypothesis) -> str:
        return self.texts.get(hypothesis.token_ids[0], f"answer {hypothesis.token_ids}")


@register_backend("engine")
class EngineBackend(EchoBackend):
    """Starts a process, as vLLM does, whose id is in the checkpoint's folder."""

    starts_processes = True
    delay: ClassVar[float] = 0.1

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        self.engine = subprocess.Popen(["sleep", "600"])
        self.checkpoint = checkpoint
        (checkpoint / "engine.txt").write_text(f"{self.engine.pid} {os.getpid()}")

    def close(self) -> None:
        self.engine.terminate()
        self.engine.wait()
        (self.checkpoint / "engine.txt").write_text("ended")


def fake_checkpoint(folder: Path, weights: bytes = b"weights") -> Path:
    """A folder that looks like a checkpoint, for backends that load none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def run_echo(tmp_path: Path, sources: list[str] = SOURCES, **options: Any) -> Any:
    job = make_job(tmp_path / "out.jsonl", sources, **options.pop("search", {}))
    model = fake_checkpoint(tmp_path / "model", options.pop("weights", b"weights"))
    return decode_jobs(model, [job], backend="echo", device="cpu", **options)[0]


def use_echo(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    """An `EchoBackend` in the place of whichever backend is asked for."""
    engine = EchoBackend()
    monkeypatch.setattr(run_module, "get_backend", lambda name: lambda: engine)
    return engine


def stop_after(monkeypatch: pytest.MonkeyPatch, echo: EchoBackend, batches: int) -> None:
    """Have it end as Ctrl-C ends it, when it has decoded so many batches."""
    original = EchoBackend.generate

    def generate(self: EchoBackend, prompts: Any, search: Any) -> Any:
        if len(self.sizes) >= batches:
            raise KeyboardInterrupt
        return original(self, prompts, search)

    monkeypatch.setattr(EchoBackend, "generate", generate)
