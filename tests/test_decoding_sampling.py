"""Sampling: the distribution it draws from, and that nothing but seed, prompt and number decides a sample.

That files are the same over any number of processes, kills and resumptions is held in `test_decoding_processes.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from scipy.stats import chisquare

from convexlm.cli import main
from convexlm.decoding import Search, decode_jobs
from convexlm.decoding.generation import Prefix, greedy_search, sample
from convexlm.decoding.generation.sampling import Sampler, uniforms
from convexlm.decoding.patience import Patience
from convexlm.errors import UserError
from convexlm.files import json_sha256
from decoding_helpers import SOURCES, make_checkpoint, make_job, read
from test_decoding_loops import EOS, PAD, VOCABULARY, random_prompts, tiny

if TYPE_CHECKING:
    from pathlib import Path

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sampling") / "checkpoint-60", steps=60)


def draw(model: Any, prompts: list[list[int]], search: Search, patience: Patience | None = None) -> list[Any]:
    with torch.inference_mode():
        return sample(model, prompts, search, EOS, PAD, Prefix(model, prompts), patience)


def mix(state: int) -> int:
    """SplitMix64's output for a state, from its publication."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_the_noise_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # its first outputs for 1234567
    assert [mix((1234567 + GOLDEN * step) & MASK) for step in (1, 2, 3)] == published
    keys = [0, 5, -7, 2**63 - 1, -(2**63)]
    for position in (0, 9, 4000):
        found = uniforms(torch.tensor(keys), position, 7).tolist()
        for key, row in zip(keys, found, strict=True):
            start = mix((key + GOLDEN * (position + 1)) & MASK)
            bits = [mix((start + GOLDEN * (token + 1)) & MASK) for token in range(7)]
            assert row == [((value >> 12) + 0.5) / 2**52 for value in bits]


def probabilities(model: Any, prompt: list[int], options: dict[str, Any], eos: bool = True) -> numpy.ndarray:
    """The distribution of the next token, by the definitions of temperature, top-k and top-p."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double().numpy()
    if not eos:
        logits[EOS] = -numpy.inf
    whole = numpy.exp((logits - logits.max()) / options.get("temperature", 1.0))
    order = numpy.argsort(-whole)
    if k := options.get("top_k", 0):
        whole[order[k:]] = 0.0
    whole /= whole.sum()
    if (p := options.get("top_p", 1.0)) < 1.0:
        before = numpy.cumsum(whole[order]) - whole[order]
        whole[order[before >= p]] = 0.0
    return whole / whole.sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_samples_follow_the_models_distribution(options: dict[str, Any]):
    """Pairs of tokens, in 20,000 samples, against their exact probabilities."""
    model, (prompt,) = tiny("llama", 5), random_prompts(5, count=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # back to softer answers
    count = 20_000
    search = Search(do_sample=True, num_return_sequences=count, max_new_tokens=2, min_new_tokens=2, **options)
    ((*found,),) = draw(model, [prompt], search)
    pairs = numpy.array([hypothesis.token_ids for hypothesis in found])
    seen = numpy.bincount(pairs[:, 0] * VOCABULARY + pairs[:, 1], minlength=VOCABULARY**2)
    first = probabilities(model, prompt, options, eos=False)
    expected = numpy.zeros((VOCABULARY, VOCABULARY))
    for token in first.nonzero()[0]:
        expected[token] = first[token] * probabilities(model, [*prompt, int(token)], options, eos=False)
    expected = expected.flatten() * count
    assert not seen[expected == 0].any()
    often = expected >= 5
    observed = [*seen[often], seen[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
        wanted = [value * sum(observed) / sum(wanted) for value in wanted]
    assert len(wanted) > 20
    assert chisquare(observed, wanted).pvalue > 0.001


def test_a_cold_sample_is_greedy_search():
    model, prompts = tiny("llama", 2), random_prompts(2)
    with torch.inference_mode():
        greedy = greedy_search(model, prompts, Search(max_new_tokens=20), EOS, PAD, Prefix(model, prompts))
    for temperature in (1e-4, 1e-300):
        cold = draw(model, prompts, Search(do_sample=True, temperature=temperature, max_new_tokens=20, seed=3))
        assert [own[0].token_ids for own in cold] == [best.token_ids for best in greedy]
        assert [own[0].log_prob for own in cold] == [best.log_prob for best in greedy]
    one = draw(model, prompts, Search(do_sample=True, top_k=1, max_new_tokens=20))
    assert [own[0].token_ids for own in one] == [best.token_ids for best in greedy]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sample_depends_on_seed_prompt_and_number_alone(kind: str):
    model, prompts = tiny(kind, 1), random_prompts(1)
    options = {"do_sample": True, "max_new_tokens": 30, "temperature": 3.0}

    def ids(prompts: list[list[int]], count: int = 3, patience: Patience | None = None, **more: Any) -> list[Any]:
        found = draw(model, prompts, Search(**options, num_return_sequences=count, **more), patience)
        return [own and [hypothesis.token_ids for hypothesis in own] for own in found]

    whole = ids(prompts)
    flat = [tuple(answer) for own in whole for answer in own]
    long = [answer for answer in flat if len(answer) > 5]
    assert len(set(long)) == len(long) > 20, "no two alike, of one prompt or of several"
    assert len({len(answer) for answer in flat}) > 5, "they leave the batch at several times"
    assert [ids([prompt])[0] for prompt in prompts] == whole
    assert ids(prompts[::-1]) == whole[::-1]
    assert ids([*prompts, *prompts]) == [*whole, *whole]
    assert [own[:1] for own in whole] == ids(prompts, count=1)
    assert all(a != b for a, b in zip(ids(prompts, seed=1), whole, strict=True))
    impatient = ids(prompts, patience=Patience(len(flat), 30 * 8))
    assert all(own in (None, other) for own, other in zip(impatient, whole, strict=True))


def test_rules_come_before_the_draw():
    model, prompts = tiny("llama", 4), random_prompts(4)
    search = Search(do_sample=True, no_repeat_ngram_size=2, min_new_tokens=6, max_new_tokens=20, temperature=2.0)
    for prompt, (answer,) in zip(prompts, draw(model, prompts, search), strict=True):
        both = prompt + answer.token_ids
        pairs = list(zip(both, both[1:], strict=False))
        new = pairs[len(prompt) - 1 :]
        assert len(set(new)) == len(new)
        assert not set(new) & set(pairs[: len(prompt) - 1])
        assert len(answer.token_ids) >= 6
        assert answer.finished == (answer.token_ids[-1] in EOS)


def test_log_probabilities_are_the_models_own_before_temperature_and_truncation():
    model, prompts = tiny("llama", 6), random_prompts(6)
    search = Search(do_sample=True, temperature=2.0, top_k=7, num_return_sequences=2, max_new_tokens=12)
    found = draw(model, prompts, search)
    model.double()
    for prompt, own in zip(prompts, found, strict=True):
        for answer in own:
            with torch.no_grad():
                log_probs = model(torch.tensor([prompt + answer.token_ids])).logits[0].log_softmax(-1)
            chosen = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer.token_ids)[:, None])
            assert answer.log_prob == pytest.approx(float(chosen.sum()), abs=1e-3)


def test_scores_without_any_token_left_do_not_stop_it():
    scores = torch.full((2, 5), float("-inf"))
    chosen = Sampler(Search(do_sample=True, top_p=0.5, top_k=2), [1, 2], scores.device).choose(scores, 0)
    assert ((chosen >= 0) & (chosen < 5)).all()


OPTIONS = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 12, "num_return_sequences": 3}


def test_records_hold_all_samples(checkpoint: Path, tmp_path: Path):
    job = make_job(tmp_path / "out.jsonl", **OPTIONS)
    result = decode_jobs(checkpoint, [job], device="cpu", batch_size=4)[0]
    assert result.search == "sample-t0.8-p0.95"
    rows = read(job.output_file)
    assert [row["source"] for row in rows] == SOURCES
    generated = sum(entry["tokens"] for row in rows for entry in row["samples"])
    assert result.tokens_per_second == pytest.approx(generated / result.seconds, rel=0.05)
    for row in rows:
        assert {key: row[key] for key in row["samples"][0]} == row["samples"][0]
        assert len(row["samples"]) == 3
        assert "nbest" not in row
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert meta["search"]["do_sample"] is True
    assert (meta["search"]["seed"], meta["search"]["top_k"]) == (0, 0)


def test_hypotheses_do_not_depend_on_batches_or_on_who_runs_the_loop(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def texts(name: str, **options: Any) -> list[list[str]]:
        job = make_job(tmp_path / f"{name}.jsonl", **OPTIONS)
        decode_jobs(checkpoint, [job], device="cpu", **options)
        return [[entry["hypothesis"] for entry in row["samples"]] for row in read(job.output_file)]

    whole = texts("whole")
    assert len({text for own in whole for text in own}) > len(SOURCES)
    assert texts("single", batch_size=1) == whole
    assert texts("budget", token_budget=400) == whole
    monkeypatch.setattr("convexlm.decoding.generation.why_not", lambda model: "for the test")
    assert texts("generate", batch_size=4) == whole


def test_another_seed_is_another_job(checkpoint: Path, tmp_path: Path):
    for seed, name in ((0, "sample"), (1, "sample-s1")):
        job = make_job(tmp_path / f"{seed}.jsonl", do_sample=True, seed=seed, max_new_tokens=8)
        assert decode_jobs(checkpoint, [job], device="cpu")[0].search == name
    texts = [[row["hypothesis"] for row in read(tmp_path / f"{seed}.jsonl")] for seed in (0, 1)]
    assert texts[0] != texts[1]
    with pytest.raises(UserError, match="search seed: 0 there, 2 now"):
        decode_jobs(
            checkpoint, [make_job(tmp_path / "0.jsonl", do_sample=True, seed=2, max_new_tokens=8)], device="cpu"
        )


def test_searches_without_sampling_are_what_they_were():
    """Decode files hold the settings: a key more, and every old file would be another job's."""
    assert Search(num_beams=4, no_repeat_ngram_size=12, label="x").settings() == {
        "num_beams": 4,
        "no_repeat_ngram_size": 12,
        "max_new_tokens": 256,
        "min_new_tokens": 0,
        "length_penalty": 1.0,
        "early_stopping": False,
    }
    assert json_sha256(Search().settings()) == "c3145188b5bc40311c3ab8bb1fa62e064ef2888a8d9b1535124821160ea549d2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "temperature is for sampling: give do_sample too"),
        ({"top_p": 1.0}, "top_p is for sampling"),
        ({"seed": 0, "num_beams": 4}, "seed is for sampling"),
        ({"do_sample": True, "num_beams": 4}, "without beams: leave out num_beams 4"),
        ({"do_sample": True, "temperature": 0}, "temperature must be above 0, not 0 .*greedy"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be above 0"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"do_sample": True, "top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"do_sample": True, "top_p": True}, "top_p must be above 0"),
        ({"do_sample": True, "top_k": -1}, "top_k must be a whole number, at least 0"),
        ({"do_sample": True, "top_k": 2.5}, "top_k must be a whole number"),
        ({"do_sample": True, "seed": -1}, "seed must be a whole number, at least 0"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Search(**options)


def test_names_and_defaults():
    assert Search(do_sample=True) == Search(do_sample=True, temperature=1, top_k=0, top_p=1, seed=0)
    for options, name in (
        ({}, "sample"),
        ({"temperature": 0.7}, "sample-t0.7"),
        ({"top_k": 50, "top_p": 0.9, "seed": 3}, "sample-k50-p0.9-s3"),
        ({"label": "mine"}, "mine"),
    ):
        assert Search.from_mapping({"do_sample": True, **options}).name == name


def test_the_command_line_samples(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sources, out = tmp_path / "a.en", tmp_path / "out.jsonl"
    sources.write_text("the dog sees\nhouse\n")
    argv = ["decode", "--model_name_or_path", str(checkpoint), "--sources", str(sources), "--pair", "en-de"]
    argv += ["--output_file", str(out), "--device", "cpu", "--max_new_tokens", "8", "--temperature", "0.7"]
    assert main(argv) == 2
    assert capsys.readouterr().err.strip().endswith("temperature is for sampling: give do_sample too, or leave it out")
    argv += ["--do_sample", "--top_k", "5", "--num_return_sequences", "2", "--seed", "1"]
    assert main([*argv, "--backend", "ctranslate2"]) == 2
    assert "one random stream" in capsys.readouterr().err
    assert main([*argv, "--backend", "auto", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["search"], result["backend"]) == ("sample-t0.7-k5-s1", "hf")
    assert all(len(row["samples"]) == 2 for row in read(out))
