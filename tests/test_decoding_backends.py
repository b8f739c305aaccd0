"""The backends beside hf: ctranslate2 held to the same hypotheses, vllm to a stand-in, auto to its reasons."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convexlm.cli import main
from convexlm.decoding import Search, ct2_cache, decode_jobs
from convexlm.decoding.auto import choose_backend
from convexlm.errors import UserError
from decoding_helpers import SOURCES, fake_checkpoint, make_checkpoint, make_job, read

needs_ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed (an optional extra)"
)
MANY = [*SOURCES, *(" ".join(reversed(source.split())) for source in SOURCES if source)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("backends") / "checkpoint-200", steps=200)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVEXLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ctranslate2


@needs_ctranslate2
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 3},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"num_beams": 4, "early_stopping": True},
        {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 12, "max_new_tokens": 3},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5, "num_return_sequences": 3},
        {"num_beams": 2, "early_stopping": True, "length_penalty": 0.0},
    ],
    ids=str,
)
def test_ctranslate2_finds_what_hf_finds(checkpoint: Path, cache: Path, tmp_path: Path, options: dict[str, Any]):
    rows = []
    for backend in ("hf", "ctranslate2"):
        job = make_job(tmp_path / f"{backend}.jsonl", MANY, **{"max_new_tokens": 20, **options})
        decode_jobs(checkpoint, [job], backend=backend, device="cpu", batch_size=7)
        rows.append(read(job.output_file))
    for one, other in zip(*rows, strict=True):
        for entry, twin in zip([one, *one.pop("nbest", [])], [other, *other.pop("nbest", [])], strict=True):
            for key in ("log_prob", "mean_log_prob"):
                assert entry.pop(key) == pytest.approx(twin.pop(key), abs=1e-4)
        assert one == other


@needs_ctranslate2
def test_no_ngram_of_the_prompt_comes_again(checkpoint: Path, cache: Path, tmp_path: Path):
    """CTranslate2's own rule sees the answer only; the answers of this model repeat words of their sources."""
    from transformers import AutoTokenizer

    from decoding_helpers import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    job = make_job(
        tmp_path / "out.jsonl", MANY, num_beams=4, early_stopping=True, no_repeat_ngram_size=2, max_new_tokens=20
    )
    decode_jobs(checkpoint, [job], backend="ctranslate2", device="cpu")
    for row, prompt in zip(read(job.output_file), prompt_ids(checkpoint, job), strict=True):
        answer = tokenizer.encode(row["hypothesis"], add_special_tokens=False)
        ids = prompt + answer
        pairs = [tuple(ids[start : start + 2]) for start in range(len(ids) - 1)]
        new = pairs[len(prompt) :]
        assert len(set(new)) == len(new)
        assert not set(new) & set(pairs[: len(prompt) - 1])


@needs_ctranslate2
def test_what_ctranslate2_cannot_do_as_asked_is_refused(checkpoint: Path, cache: Path, tmp_path: Path):
    for options, message in (
        ({"num_beams": 4}, "early_stopping false: ask for --early_stopping true"),
        ({"num_beams": 4, "early_stopping": "never"}, "early_stopping never"),
        ({"num_beams": 4, "early_stopping": True, "min_new_tokens": 2}, "min_new_tokens"),
        (
            {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2, "length_penalty": 0.0},
            "length_penalty",
        ),
    ):
        with pytest.raises(UserError, match=message):
            decode_jobs(checkpoint, [make_job(tmp_path / "o.jsonl", **options)], backend="ctranslate2", device="cpu")
    job = make_job(tmp_path / "o.jsonl")
    for options, message in (
        ({"backend": "ctranslate2", "dtype": "bfloat16"}, "cannot compute in bfloat16 on cpu; it can: .*int8"),
        ({"backend": "ctranslate2", "compute_type": "int3"}, "unknown compute_type `int3`"),
        ({"backend": "ctranslate2", "compute_type": "int8", "dtype": "float32"}, "not both"),
        ({"backend": "hf", "compute_type": "int8"}, "hf backend takes a dtype and no compute_type"),
    ):
        with pytest.raises(UserError, match=message):
            decode_jobs(checkpoint, [job], device="cpu", **options)
    assert not list(tmp_path.glob("o.*"))


@needs_ctranslate2
def test_int8_is_another_job_from_the_same_conversion(checkpoint: Path, cache: Path, tmp_path: Path):
    job = make_job(tmp_path / "out.jsonl", max_new_tokens=20)
    decode_jobs(checkpoint, [job], backend="ctranslate2", device="cpu")
    (converted,) = (path for path in (cache / "ctranslate2").iterdir() if path.is_dir())
    written = (converted / "model.bin").stat().st_mtime_ns
    with pytest.raises(UserError, match="dtype: float32 there, int8 now"):
        decode_jobs(checkpoint, [job], backend="ctranslate2", compute_type="int8", device="cpu")
    other = make_job(tmp_path / "int8.jsonl", max_new_tokens=20)
    decode_jobs(checkpoint, [other], backend="ctranslate2", compute_type="int8", device="cpu")
    assert (converted / "model.bin").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "int8.meta.json").read_text())["dtype"] == "int8"
    scores = [[row["log_prob"] for row in read(job.output_file)] for job in (job, other)]
    assert scores[0] != scores[1]


@needs_ctranslate2
def test_a_conversion_to_another_model_is_noticed(
    checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ctranslate2.converters import transformers as converters

    def layer_norm(self: Any, spec: Any, layer_norm: Any) -> None:
        spec.gamma = layer_norm.weight * 1.05

    monkeypatch.setattr(converters.LlamaLoader, "set_layer_norm", layer_norm)
    with pytest.raises(UserError, match="computes something else"):
        decode_jobs(checkpoint, [make_job(tmp_path / "out.jsonl")], backend="ctranslate2", device="cpu")
    assert not [path for path in (cache / "ctranslate2").iterdir() if path.is_dir()]


@needs_ctranslate2
def test_an_adapter_is_merged_for_ctranslate2(checkpoint: Path, cache: Path, tmp_path: Path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    options = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapter = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")).save_pretrained(
        adapter
    )
    texts = []
    for backend in ("hf", "ctranslate2"):
        job = make_job(tmp_path / f"{backend}.jsonl", max_new_tokens=20)
        decode_jobs(adapter, [job], backend=backend, device="cpu")
        texts.append([row["hypothesis"] for row in read(job.output_file)])
    assert texts[0] == texts[1]


CONVERT = """
import sys
from pathlib import Path
from convexlm.decoding.ct2_cache import converted
print(converted(Path(sys.argv[1]), "d" * 64))
"""


@needs_ctranslate2
@pytest.mark.slow
def test_conversions_at_once_and_killed_ones(checkpoint: Path, cache: Path):
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CONVERT, str(checkpoint)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    root = cache / "ctranslate2"
    kills = 0
    for _ in range(2):  # killed while it converts: its folder is there under another name
        process = start()
        while process.poll() is None and not list(root.glob(".d*")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += bool(list(root.glob(".d*")))
        assert not list(root.glob("d*/"))
    assert kills
    both = [start(), start()]
    places = [process.communicate()[0].strip().split("\n")[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert places[0] == places[1]
    assert sorted(path.name for path in Path(places[0]).iterdir()) == [
        *("config.json", "convexlm-files.json", "model.bin", "vocabulary.json"),
    ]
    assert not list(root.glob(".d*"))


@needs_ctranslate2
def test_a_conversion_by_other_code_is_not_taken(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    first = ct2_cache.converted(checkpoint, "d" * 64)
    for damage in (lambda: os.truncate(first / "model.bin", 5000), (first / "vocabulary.json").unlink):
        damage()  # by a full disk, or by what cleans caches
        assert ct2_cache.converted(checkpoint, "d" * 64) == first
        assert (first / "model.bin").stat().st_size > 5000 and (first / "vocabulary.json").exists()
    (first / "mark").touch()
    assert ct2_cache.converted(checkpoint, "d" * 64) == first
    monkeypatch.setattr(ct2_cache, "_code_hash", lambda: "0" * 64)
    again = ct2_cache.converted(checkpoint, "d" * 64)
    assert again != first and not (again / "mark").exists() and (first / "mark").exists()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = fake_checkpoint(tmp_path / "model")
    for library, hint in (("ctranslate2", r"pip install 'convexlm\[ctranslate2\]'"), ("vllm", "pip install vllm")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=hint):
            decode_jobs(model, [make_job(tmp_path / "out.jsonl")], backend=library, device="cpu")


# auto


def test_auto_says_what_it_chose_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = fake_checkpoint(tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "llama"}')
    scaled = fake_checkpoint(tmp_path / "scaled")
    (scaled / "config.json").write_text(
        '{"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8}}'
    )
    wide = fake_checkpoint(tmp_path / "wide")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 16, "rope_parameters": {"rope_type": "linear"}}
    (wide / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    other = fake_checkpoint(tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "mamba"}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    greedy, beam, stops = Search(), Search(num_beams=4), Search(num_beams=4, early_stopping=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for arguments, name, reason in (
        ((model, [greedy, stops], "cpu", None, None), "ctranslate2", "on a CPU"),
        ((model, [greedy, beam], "cpu", None, None), "hf", "early_stopping false"),
        ((model, [greedy], "cuda:1", None, None), "hf", "cuda:1"),
        ((model, [greedy], "cpu", "bfloat16", None), "hf", "bfloat16"),
        ((model, [beam], "cpu", None, "int8"), "ctranslate2", "int8"),
        ((other, [greedy], "cpu", None, None), "hf", "mamba"),
        ((scaled, [greedy], "cpu", None, None), "hf", "position angles llama3"),
        ((wide, [greedy], "cpu", None, None), "hf", "head_dim 16"),
        ((adapter, [greedy], "cpu", None, None), "hf", "adapter"),
    ):
        chosen, why = choose_backend(*arguments)
        assert chosen == name
        assert reason in why
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(model, [greedy], "cpu", None, None)[0] == "hf"
    assert "not installed" in choose_backend(model, [greedy], "cpu", None, None)[1]


def test_the_command_line_tells_of_the_choice(
    checkpoint: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sources = tmp_path / "a.en"
    sources.write_text("the dog sees\nhouse\n")
    required = ["--model_name_or_path", str(checkpoint), "--sources", str(sources), "--pair", "en-de"]
    argv = ["decode", *required, "--max_new_tokens", "8", "--device", "cpu", "--backend", "auto", "--num_beams", "2"]
    out = tmp_path / "out.jsonl"
    assert main([*argv, "--output_file", str(out), "--num_return_sequences", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["backend"] == "hf"
    assert captured.err.startswith("backend hf: ctranslate2")
    reason = "early_stopping" if importlib.util.find_spec("ctranslate2") else "not installed"
    assert reason in json.loads((tmp_path / "out.meta.json").read_text())["backend_chosen_because"]
    assert all(len(row["nbest"]) == 2 for row in read(out))
    if importlib.util.find_spec("ctranslate2"):
        more = ["--early_stopping", "true", "--compute_type", "int8"]
        assert main([*argv, "--output_file", str(tmp_path / "int8.jsonl"), *more]) == 0
        assert capsys.readouterr().err.startswith("backend ctranslate2: only it has a compute_type")
