"""Decoding: the search, the hf backend against independent oracles, checkpoint folders, batches."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from convexlm.decoding import Search, checkpoint_sha256, decode_jobs, find_checkpoint
from convexlm.decoding.batching import plan_batches
from convexlm.errors import UserError
from convexlm.tokenization import PromptSettings
from decoding_helpers import (
    SOURCES,
    fake_checkpoint,
    make_checkpoint,
    make_job,
    make_test_set,
    make_tokenizer,
    prompt_ids,
    read,
)

SEARCHES = [
    {"num_beams": 1},
    {"num_beams": 1, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"num_beams": 4},
    {"num_beams": 4, "no_repeat_ngram_size": 3},
    {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "min_new_tokens": 2},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never", "no_repeat_ngram_size": 1},
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("decoding") / "checkpoint-200", steps=200)


# Search


def test_a_search_has_a_name_and_settings():
    assert Search().name == "greedy"
    assert Search(num_beams=4).name == "beam4"
    assert Search(num_beams=4, label="beam4-free").name == "beam4-free"
    assert Search(num_beams=4, label="x").settings() == Search(num_beams=4, length_penalty=1).settings()
    assert "label" not in Search().settings()
    assert Search.from_mapping({"num_beams": 2, "early_stopping": "never"}).early_stopping == "never"


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 0},
        {"num_beams": 10**30},
        {"num_beams": True},
        {"num_beams": 2.0},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 300},
        {"no_repeat_ngram_size": -1},
        {"length_penalty": float("nan")},
        {"length_penalty": 1000.0},  # what it is a power of leaves the range of a float
        {"length_penalty": -40.0, "max_new_tokens": 20},
        {"length_penalty": "1"},
        {"early_stopping": "always"},
        {"label": "../x"},
        {"label": ""},
        {"temperature": 0.5},
    ],
)
def test_a_bad_search_is_refused_by_name(options: dict[str, Any]):
    with pytest.raises(UserError, match=next(iter(options))):
        Search.from_mapping(options)


def test_the_generation_config_has_no_sampling():
    config = Search(num_beams=4, no_repeat_ngram_size=12, length_penalty=0.5).to_generation_config(eos_token_id=[2, 5])
    assert (config.num_beams, config.no_repeat_ngram_size, config.length_penalty) == (4, 12, 0.5)
    assert config.do_sample is False
    assert config.eos_token_id == [2, 5]
    assert config.temperature is None


# The hf backend


def reference_generate(checkpoint: Path, ids: list[int], options: dict[str, Any], max_new_tokens: int) -> list[int]:
    """transformers on one prompt alone, without any of our code: no padding, its own n-gram rule."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=2,
        pad_token_id=3,
        **options,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("loops", ["ours", "generate"])
def test_batches_give_what_transformers_gives_for_each_prompt_alone(
    checkpoint: Path, tmp_path: Path, options: dict, loops: str, monkeypatch: pytest.MonkeyPatch
):
    if loops == "generate":
        monkeypatch.setattr("convexlm.decoding.generation.why_not", lambda model: "for the test")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    job = make_job(tmp_path / "out.jsonl", max_new_tokens=20, **options)
    expected = [reference_generate(checkpoint, ids, options, 20) for ids in prompt_ids(checkpoint, job)]
    assert len({len(ids) for ids in expected}) > 1, "the answers should end at different places"
    for batch_size in (1, 3, 8):
        out = tmp_path / f"{batch_size}.jsonl"
        decode_jobs(checkpoint, [make_job(out, max_new_tokens=20, **options)], batch_size=batch_size, device="cpu")
        rows = read(out)
        assert [row["id"] for row in rows] == [str(number) for number in range(len(SOURCES))]
        assert [row["source"] for row in rows] == SOURCES
        for row, ids in zip(rows, expected, strict=True):
            assert row["hypothesis"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert row["tokens"] == len(ids)
            assert row["finished"] == (ids[-1] == 2)


@pytest.mark.parametrize("options", SEARCHES[1:4], ids=str)
def test_log_prob_is_the_models_own(checkpoint: Path, tmp_path: Path, options: dict):
    """Against a teacher-forced pass in float64, one sentence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    job = make_job(tmp_path / "out.jsonl", max_new_tokens=20, **options)
    decode_jobs(checkpoint, [job], device="cpu")
    for row, prompt in zip(read(job.output_file), prompt_ids(checkpoint, job), strict=True):
        answer = reference_generate(checkpoint, prompt, options, 20)
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total = sum(float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        assert row["log_prob"] == pytest.approx(total, abs=1e-4)
        assert row["mean_log_prob"] == pytest.approx(total / len(answer), abs=1e-5)


def test_scoring_in_pieces_changes_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from convexlm.decoding.backends.hf import HuggingFaceBackend

    whole = make_job(tmp_path / "whole.jsonl", max_new_tokens=20)
    decode_jobs(checkpoint, [whole], device="cpu")  # by our own loop, without a scoring pass
    monkeypatch.setattr("convexlm.decoding.generation.why_not", lambda model: "for the test")
    original, calls = HuggingFaceBackend._score_rows, []

    def score_rows(self: Any, prompts: Any, answers: Any) -> Any:
        calls.append(len(prompts))
        return original(self, prompts, answers)

    monkeypatch.setattr(HuggingFaceBackend, "_score_rows", score_rows)
    monkeypatch.setattr("convexlm.decoding.backends.hf.LOGITS_AT_ONCE", 40_000)
    pieces = make_job(tmp_path / "pieces.jsonl", max_new_tokens=20)
    decode_jobs(checkpoint, [pieces], device="cpu")
    assert len(calls) > 1
    assert sum(calls) == len(SOURCES)
    for one, other in zip(read(whole.output_file), read(pieces.output_file), strict=True):
        assert other.pop("log_prob") == pytest.approx(one.pop("log_prob"), abs=1e-5)
        assert other.pop("mean_log_prob") == pytest.approx(one.pop("mean_log_prob"), abs=1e-5)
        assert one == other


def test_sampling_settings_of_the_checkpoint_do_not_leak(checkpoint: Path, tmp_path: Path):
    import shutil

    sampler = tmp_path / "sampler"
    shutil.copytree(checkpoint, sampler)
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 0.6, "repetition_penalty": 9.0, "max_length": 7}
    (sampler / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 2, "pad_token_id": 3}))
    for search in ({"num_beams": 1}, {"num_beams": 3}):
        plain, odd = tmp_path / f"plain{search}.jsonl", tmp_path / f"odd{search}.jsonl"
        decode_jobs(checkpoint, [make_job(plain, max_new_tokens=20, **search)], device="cpu")
        decode_jobs(sampler, [make_job(odd, max_new_tokens=20, **search)], device="cpu")
        assert plain.read_bytes() == odd.read_bytes()


def test_every_eos_ends_an_answer_and_padding_is_no_text(checkpoint: Path, tmp_path: Path):
    """A second EOS id, given by the generation config only; no pad token, so EOS pads; n-grams of one token."""
    import shutil

    job = make_job(tmp_path / "one.jsonl", max_new_tokens=20)
    first = [reference_generate(checkpoint, ids, {}, 20)[0] for ids in prompt_ids(checkpoint, job)]
    extra = next(token for token in first if token != 2)
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [extra, 2]}))
    make_tokenizer(pad=False).save_pretrained(other)
    decode_jobs(other, [job], device="cpu")
    for row, token in zip(read(job.output_file), first, strict=True):
        assert row["finished"]
        assert row["tokens"] == 1 if token in (extra, 2) else row["tokens"] > 1
    results = []
    for batch_size in (1, 8):
        job = make_job(tmp_path / f"no_repeat{batch_size}.jsonl", max_new_tokens=30, no_repeat_ngram_size=1)
        decode_jobs(other, [job], batch_size=batch_size, device="cpu")
        results.append([(row["hypothesis"], row["tokens"], row["finished"]) for row in read(job.output_file)])
    assert results[0] == results[1]


def test_an_adapter_is_decoded_on_its_base(checkpoint: Path, tmp_path: Path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    options = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(base, LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    make_tokenizer().save_pretrained(merged)
    jobs = [make_job(tmp_path / f"{name}.jsonl", max_new_tokens=20) for name in ("base", "adapter", "merged")]
    for folder, job in zip((checkpoint, adapter, merged), jobs, strict=True):
        decode_jobs(folder, [job], device="cpu")
    plain, own, expected = ([row["hypothesis"] for row in read(job.output_file)] for job in jobs)
    assert own == expected
    assert own != plain
    assert checkpoint_sha256(adapter) != checkpoint_sha256(checkpoint)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(checkpoint: Path, tmp_path: Path):
    sources = ["house", "house " * 400]
    with pytest.raises(UserError, match=r"sentence 1 has \d{3} tokens.*max_new_tokens 200.*512") as error:
        decode_jobs(checkpoint, [make_job(tmp_path / "out.jsonl", sources, max_new_tokens=200)], device="cpu")
    ids = prompt_ids(checkpoint, make_job(tmp_path / "out.jsonl", sources))
    assert f"{len(ids[1])} tokens" in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_a_gpu_finds_what_the_cpu_finds(checkpoint: Path, tmp_path: Path, options: dict):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = []
    for device in ("cpu", "cuda"):
        job = make_job(tmp_path / f"{device}.jsonl", max_new_tokens=20, **options)
        decode_jobs(checkpoint, [job], device=device, dtype="float32")
        rows.append(read(job.output_file))
    for one, other in zip(*rows, strict=True):
        assert (one["hypothesis"], one["tokens"]) == (other["hypothesis"], other["tokens"])
        assert one["log_prob"] == pytest.approx(other["log_prob"], abs=1e-3)


# Checkpoint folders


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path):
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            find_checkpoint(folder)

    refused(tmp_path / "none", "no such checkpoint folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    run = tmp_path / "run"
    (run / "checkpoint-200").mkdir(parents=True)
    refused(run, r"not a checkpoint folder.*did you mean .*checkpoint-200")
    model = fake_checkpoint(tmp_path / "model")
    assert find_checkpoint(model) == model
    (model / "model.safetensors").unlink()
    refused(model, "weights missing")
    (model / "pytorch_model.bin").write_bytes(b"")
    refused(model, "pickles")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(model, r"weights missing \(model-1.safetensors\)")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "adapter without weights")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "x"}')
    refused(adapter, r"PREFIX_TUNING \(virtual tokens\)")


def test_weights_that_do_not_fit_the_config_are_refused(checkpoint: Path, tmp_path: Path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="weights do not fit its config"):
        decode_jobs(broken, [make_job(tmp_path / "out.jsonl")], device="cpu")
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot be loaded"):
        decode_jobs(broken, [make_job(tmp_path / "out.jsonl")], device="cpu")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("loop", ["ours", "generate"])
def test_a_model_that_diverged_is_one_line(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], loop: str, monkeypatch: pytest.MonkeyPatch
):
    from safetensors.torch import load_file, save_file

    if loop == "generate":
        monkeypatch.setattr("convexlm.decoding.generation.why_not", lambda model: "for the test")
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no numbers"):
        decode_jobs(model, [make_job(tmp_path / "out.jsonl", max_new_tokens=4, **options)], device="cpu")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_hash_covers_what_changes_answers_only(tmp_path: Path):
    model = fake_checkpoint(tmp_path / "model")
    before = checkpoint_sha256(model)
    (model / "optimizer.pt").write_bytes(b"state")
    (model / "trainer_state.json").write_text("{}")
    assert checkpoint_sha256(model) == before
    assert checkpoint_sha256(fake_checkpoint(tmp_path / "copy")) == before
    PromptSettings("alpaca", True).save(model)
    after = checkpoint_sha256(model)
    assert after != before
    (model / "tokenizer.json").write_text("{}")
    assert checkpoint_sha256(model) not in (before, after)
    whole = checkpoint_sha256(model)
    (model / "qwen.tiktoken").write_text("IQ== 0")
    assert checkpoint_sha256(model) != whole


def test_unknown_names_are_refused(tmp_path: Path):
    job = make_job(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="unknown decoding backend `nope`; known: ctranslate2, echo, .*hf, .*vllm"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), [job], backend="nope")
    with pytest.raises(UserError, match="unknown dtype `int3`"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), [job], device="cpu", dtype="int3")
    with pytest.raises(UserError, match="device `nope`"):
        decode_jobs(fake_checkpoint(tmp_path / "model"), [job], device="nope")
    assert not (tmp_path / "out.jsonl.part").exists()


# Batches


def test_batches_hold_the_budget_and_every_sentence_once():
    chance = random.Random(0)
    lengths = [chance.randint(0, 300) for _ in range(500)]
    held = [length + 4 * 100 for length in lengths]
    for batch_size, budget in ((None, 8000), (7, 8000), (None, 1)):
        batches = plan_batches(range(500), lengths, held, batch_size, budget)
        assert sorted(position for batch in batches for position in batch) == list(range(500))
        flat = [lengths[position] for batch in batches for position in batch]
        assert flat == sorted(lengths, reverse=True)
        for batch in batches:
            tokens = sum(held[position] for position in batch)
            assert len(batch) <= 7 if batch_size else tokens <= budget or len(batch) == 1
    assert sorted(sum(plan_batches([3, 1, 4], lengths, held), ())) == [1, 3, 4]


# Prompts


def test_prompts_are_filled_from_the_instruction():
    from dataclasses import replace

    job = make_job(Path("x.jsonl"), ["  ein Haus \n", ""])
    with_input, without = job.prompts()
    assert "Translate the following sentences from English to German." in with_input
    assert "### Input:\nein Haus\n\n### Response:" in with_input
    assert "### Input" not in without
    summary = replace(job, instruction="Summarise the text.", test_set=make_test_set(["text"], pair=""))
    assert "### Instruction:\nSummarise the text.\n" in summary.prompts()[0]
    with pytest.raises(UserError, match="en-de"):
        replace(summary, instruction=None).prompts()
