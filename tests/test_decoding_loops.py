"""Our greedy and beam search against transformers' own, and the parts they are made of."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from convexlm.decoding import Search
from convexlm.decoding.batching import common_head
from convexlm.decoding.generation import Prefix, Rows, beam_search, greedy_search, why_not
from convexlm.decoding.generation.rules import Rules
from convexlm.decoding.ngrams import NoRepeatNgrams
from convexlm.errors import UserError
from decoding_helpers import SOURCES, make_checkpoint, make_job, prompt_ids

if TYPE_CHECKING:
    from pathlib import Path

    from convexlm.decoding.backends.base import Hypothesis

VOCABULARY, EOS, PAD = 23, [2], 3
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 256}


def tiny(kind: str, seed: int = 0) -> Any:
    """An untrained model with sharp, wayward answers, of which some end early and some never."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256))
    elif kind == "eager":
        model = LlamaForCausalLM(LlamaConfig(**COMMON, **SIZES, attn_implementation="eager"))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**COMMON, **SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**COMMON, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


def random_prompts(seed: int, count: int = 13, head: int = 5) -> list[list[int]]:
    chance = random.Random(seed)
    shared = [chance.randrange(4, VOCABULARY) for _ in range(head)]
    return [shared + [chance.randrange(4, VOCABULARY) for _ in range(chance.randint(1, 9))] for _ in range(count)]


def by_transformers(model: Any, prompt: list[int], search: Search) -> list[list[int]]:
    options: dict[str, Any] = {"num_beams": search.num_beams, "num_return_sequences": search.num_return_sequences}
    if search.num_beams > 1:
        options.update(length_penalty=search.length_penalty, early_stopping=search.early_stopping)
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=search.max_new_tokens,
        min_new_tokens=search.min_new_tokens or None,
        no_repeat_ngram_size=search.no_repeat_ngram_size or None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **options,
    )
    rows = [row[len(prompt) :] for row in output.tolist()]
    return [row[: row.index(EOS[0]) + 1] if EOS[0] in row else row for row in rows]


def by_us(model: Any, prompts: list[list[int]], search: Search, head: int | None = None) -> list[list[Hypothesis]]:
    with torch.inference_mode():
        prefix = Prefix(model, prompts)
        if head is not None:
            assert len(prefix.ids) == head
        common = (model, prompts, search, EOS, PAD, prefix)
        return beam_search(*common) if search.num_beams > 1 else [[best] for best in greedy_search(*common)]


def searches(chance: random.Random) -> Search:
    beams = chance.choice([1, 2, 3, 4, 5])
    return Search(
        num_beams=beams,
        no_repeat_ngram_size=chance.choice([0, 0, 1, 2, 3, 12]),
        max_new_tokens=chance.choice([1, 2, 8, 20]),
        min_new_tokens=chance.choice([0, 0, 1]),
        length_penalty=chance.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
        early_stopping=chance.choice([False, True, "never"]),
        num_return_sequences=chance.randint(1, beams),
    )


@pytest.mark.parametrize("seed", range(24))
def test_hypotheses_are_those_of_transformers_for_each_prompt_alone(seed: int):
    chance = random.Random(seed)
    search = searches(chance)
    model = tiny(("llama", "eager", "gpt2", "qwen2")[seed % 4], seed)
    assert why_not(model) == ""
    prompts = random_prompts(seed, head=chance.choice([0, 5]))
    found = by_us(model, prompts, search)
    for prompt, own in zip(prompts, found, strict=True):
        expected = by_transformers(model, prompt, search)
        assert [hypothesis.token_ids for hypothesis in own[: len(expected)]] == expected, search
        with torch.no_grad():
            for hypothesis in own:
                log_probs = model.double()(torch.tensor([prompt + hypothesis.token_ids])).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) - 1 + len(hypothesis.token_ids))
                total = sum(
                    float(log_probs[place, token]) for place, token in zip(places, hypothesis.token_ids, strict=True)
                )
                assert hypothesis.log_prob == pytest.approx(total, abs=1e-3)
                assert hypothesis.finished == (hypothesis.token_ids[-1] in EOS)
        model.float()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_finished_sentences_leave_the_batch(monkeypatch: pytest.MonkeyPatch, num_beams: int):
    """One sentence that never ends must not keep the others in the batch."""
    rows_in_steps: list[int] = []
    original = Rows._forward

    def forward(self: Rows, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows_in_steps.append(len(ids))
        return original(self, ids, *rest)

    monkeypatch.setattr(Rows, "_forward", forward)
    model = tiny("llama", 3)
    prompts = random_prompts(1, count=40)
    found = by_us(model, prompts, Search(num_beams=num_beams, max_new_tokens=60, early_stopping=True))
    lengths = sorted(len(own[0].token_ids) for own in found)
    assert rows_in_steps[0] == 40
    assert rows_in_steps == sorted(rows_in_steps, reverse=True)
    assert rows_in_steps[-1] < 40, lengths
    if num_beams == 1:
        for step, rows in enumerate(rows_in_steps[1:], start=1):
            still = sum(length > step for length in lengths)
            assert still <= rows < max(2, still * 8 / 7 + 1), step


def test_the_shared_head_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    prompts = random_prompts(0, head=30)
    fed: list[int] = []
    original = type(model).forward

    def forward(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        fed.append(input_ids.numel())
        return original(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", functools.wraps(original)(lambda self, **o: forward(self, **o)))
    with torch.inference_mode():
        prefix = Prefix(model, prompts)
        Rows(model, prompts, PAD, prefix, beams=4)
    assert len(prefix.ids) >= 30
    widest = max(map(len, prompts)) - len(prefix.ids)
    assert fed == [len(prefix.ids), len(prompts) * widest]


def test_the_common_head_leaves_a_token_of_each():
    assert common_head([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == [1, 2]
    assert common_head([[1, 2], [1, 2]]) == [1]
    assert common_head([[1, 2, 3], [1, 2]]) == [1]
    assert common_head([[7], [8]]) == []
    assert common_head([[1, 2, 3]]) == [1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_ngram_rule_token_by_token_is_the_rule_over_whole_rows(size: int):
    """Against the stateless rule, which another test holds to transformers'; over random rows with many repeats."""
    chance = random.Random(size)
    prompts = [[chance.randrange(4) for _ in range(chance.randint(1, 9))] for _ in range(12)]
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    rules = Rules(Search(no_repeat_ngram_size=size), prompts, [], torch.device("cpu"))
    stateless = NoRepeatNgrams(size, mask, 1)
    for step in range(12):
        scores = torch.randn(len(rows), 4)
        assert torch.equal(rules.apply(scores), stateless(rows, scores)), step
        tokens = torch.tensor([chance.randrange(4) for _ in rows])
        if step == 6:  # rows change places, as beams do
            order = torch.tensor([chance.randrange(len(rows)) for _ in rows])
            rules.take(order)
            rows, stateless.padding = rows[order], stateless.padding[order]
        rules.append(tokens)
        rows = torch.cat((rows, tokens[:, None]), dim=1)


def test_models_that_keep_something_else_are_left_to_generate(tmp_path: Path):
    sliding = MistralForCausalLM(MistralConfig(**COMMON, **SIZES, sliding_window=8))
    assert "keep more, or less" in why_not(sliding)
    plain = MistralForCausalLM(MistralConfig(**COMMON, **SIZES, sliding_window=None))
    assert why_not(plain) == ""
    dynamic = LlamaForCausalLM(
        LlamaConfig(**COMMON, **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    assert "position angles" in why_not(dynamic)


def test_a_trained_model_gives_its_nbest_in_order(tmp_path: Path):
    """Through the whole of decode_jobs, by our loop and by `generate`: the same records."""
    from convexlm.decoding import decode_jobs
    from decoding_helpers import read

    checkpoint = make_checkpoint(tmp_path / "checkpoint", steps=40)
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12}
    job = make_job(tmp_path / "nbest.jsonl", **options)
    decode_jobs(checkpoint, [job], device="cpu")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for row, prompt in zip(read(job.output_file), prompt_ids(checkpoint, job), strict=True):
        assert [entry["hypothesis"] for entry in row["nbest"]][0] == row["hypothesis"]
        assert {key: row[key] for key in row["nbest"][0]} == row["nbest"][0]
        assert [entry["tokens"] for entry in row["nbest"]] == [
            len(ids) for ids in by_transformers(model, prompt, job.search)
        ]
        scores = [entry["mean_log_prob"] for entry in row["nbest"]]
        assert scores == sorted(scores, reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convexlm.decoding.generation.why_not", lambda model: "for the test")
        other = make_job(tmp_path / "other.jsonl", **options)
        decode_jobs(checkpoint, [other], device="cpu")
    texts = [[[entry["hypothesis"] for entry in row["nbest"]] for row in read(j.output_file)] for j in (job, other)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(SOURCES)
    plain = make_job(tmp_path / "plain.jsonl", num_beams=4, max_new_tokens=12)
    decode_jobs(checkpoint, [plain], device="cpu")
    assert not any("nbest" in row for row in read(plain.output_file))
    assert [row["hypothesis"] for row in read(plain.output_file)] == [
        row["hypothesis"] for row in read(job.output_file)
    ]


@pytest.mark.parametrize("options", [{"length_penalty": -9.0}, {"no_repeat_ngram_size": 1}], ids=str)
def test_a_beam_search_that_finishes_nothing_is_one_line(options: dict[str, Any]):
    model = tiny("llama")
    search = Search(num_beams=2, max_new_tokens=40, early_stopping="never", min_new_tokens=40, **options)
    with pytest.raises(UserError, match="nothing finished.*length_penalty"):
        by_us(model, random_prompts(0, count=3), search)
