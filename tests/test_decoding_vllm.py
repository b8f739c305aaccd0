"""The vllm backend: what it asks the library for, by a stand-in; and, where vLLM is installed, what that answers.

vLLM wants an older transformers than `constraints.txt` has, so it is not in the `dev` extra. docs/decoding.md says how
to run this file with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from convexlm.decoding import CheckpointJobs, decode_jobs, decode_sweep
from convexlm.errors import UserError
from decoding_helpers import SOURCES, make_checkpoint, make_job, prompt_ids, read

if TYPE_CHECKING:
    from collections.abc import Callable

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
MANY = [*SOURCES, *(" ".join(reversed(source.split())) for source in SOURCES if source)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vllm") / "checkpoint-200", steps=200, heads=1)


def device() -> str:
    """What the vLLM that is installed is built for."""
    from convexlm.decoding.backends.vllm import built_for

    return built_for()


def decode(folder: Path, output_file: Path, sources: list[str] = MANY, backend: str = "vllm", **options: Any) -> None:
    job = make_job(output_file, sources, **{"max_new_tokens": 20, **options})
    decode_jobs(folder, [job], backend=backend, device=device(), dtype="float32")


# A stand-in of the library


class FakeLLM:
    """vLLM's engine as far as the backend uses it; answers with the prompt's last token, then EOS."""

    made: list[dict[str, Any]] = []
    asked: list[Any] = []

    def __init__(self, **options: Any) -> None:
        FakeLLM.made.append(options)

    def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
        FakeLLM.asked.append(params)
        outputs = []
        each = params if isinstance(params, list) else [params] * len(prompts)
        for prompt, own in zip(prompts, each, strict=True):
            tokens = [prompt["prompt_token_ids"][-1], 2][: own.max_tokens]
            completion = types.SimpleNamespace(token_ids=tuple(tokens), cumulative_logprob=-0.5 * len(tokens))
            outputs.append(types.SimpleNamespace(outputs=[completion]))
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = types.ModuleType("vllm")
    module.LLM = FakeLLM
    module.SamplingParams = lambda **options: types.SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("convexlm.decoding.backends.vllm.built_for", lambda: "cuda")
    monkeypatch.setattr("convexlm.decoding.prepare.choose_device", lambda device: device)
    monkeypatch.setattr("convexlm.decoding.backends.vllm.VllmBackend.starts_processes", False)
    FakeLLM.made, FakeLLM.asked = [], []
    return FakeLLM


def test_vllm_is_asked_for_greedy_search(checkpoint: Path, vllm: type[FakeLLM], tmp_path: Path):
    job = make_job(tmp_path / "out.jsonl", max_new_tokens=5, min_new_tokens=1)
    decode_jobs(checkpoint, [job], backend="vllm", device="cuda", dtype="bfloat16")
    (made,), params = vllm.made, vllm.asked[0]
    assert (made["model"], made["dtype"], made["generation_config"]) == (str(checkpoint), "bfloat16", "vllm")
    assert (params.temperature, params.max_tokens, params.min_tokens, params.stop_token_ids) == (0.0, 5, 1, [2])
    rows = read(job.output_file)
    assert [row["id"] for row in rows] == [str(number) for number in range(len(SOURCES))]
    assert {(row["tokens"], row["finished"], row["log_prob"]) for row in rows} == {(2, True, -1.0)}
    cut = make_job(tmp_path / "cut.jsonl", max_new_tokens=1)
    assert decode_jobs(checkpoint, [cut], backend="vllm", device="cuda")[0].cut == len(SOURCES)


def test_vllm_is_asked_for_samples_with_a_seed_each(checkpoint: Path, vllm: type[FakeLLM], tmp_path: Path):
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    for name, more in (("one", {}), ("three", {"num_return_sequences": 3, "top_k": 4}), ("other", {"seed": 1})):
        job = make_job(tmp_path / f"{name}.jsonl", **options, **more)
        decode_jobs(checkpoint, [job], backend="vllm", device="cuda", dtype="bfloat16")
    one, three, other = vllm.asked
    assert {(params.temperature, params.top_p, params.top_k) for params in one} == {(0.7, 0.9, -1)}
    assert {params.top_k for params in three} == {4}
    seeds = [[params.seed for params in asked] for asked in (one, three, other)]
    assert seeds[1][::3] == seeds[0], "the first sample is the same, however many are asked for"
    assert len({*seeds[1], *seeds[2]}) == 4 * len(SOURCES)
    assert all(0 <= seed < 2**63 for seed in seeds[1])
    assert all(len(row["samples"]) == 3 for row in read(tmp_path / "three.jsonl"))


def test_what_vllm_would_do_otherwise_is_refused(checkpoint: Path, vllm: type[FakeLLM], tmp_path: Path):
    out = tmp_path / "out.jsonl"
    for options, device, message in (
        ({"num_beams": 4}, "cuda", "divides scores by the length"),
        ({"no_repeat_ngram_size": 12}, "cuda", "no_repeat_ngram_size"),
        ({"do_sample": True, "temperature": 0.001}, "cuda", "raises a temperature of 0.001 to 0.01"),
        ({}, "cpu", "is for cuda, and the device is cpu: use another device"),
    ):
        with pytest.raises(UserError, match=message):
            decode_jobs(checkpoint, [make_job(out, **options)], backend="vllm", device=device)
    adapter = tmp_path / "adapter"
    shutil.copytree(checkpoint, adapter)
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    config = {"base_model_name_or_path": str(checkpoint)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="takes no adapter"):
        decode_jobs(adapter, [make_job(out)], backend="vllm", device="cuda", dtype="float32")
    assert vllm.made == []


def test_the_share_of_a_gpus_memory_reaches_vllm(checkpoint: Path, vllm: type[FakeLLM], tmp_path: Path):
    for share in (None, 0.5, 1):
        job = make_job(tmp_path / f"{share}.jsonl", max_new_tokens=5)
        decode_jobs(checkpoint, [job], backend="vllm", device="cuda", gpu_memory_utilization=share)
    assert [made.get("gpu_memory_utilization") for made in vllm.made] == [None, 0.5, 1]
    assert "gpu_memory_utilization" not in vllm.made[0], "vLLM's own default holds"


@pytest.mark.parametrize(
    ("options", "gpus", "said"),
    [
        ({"gpu_memory_utilization": 0.0}, 1, "above 0 and at most 1, not 0.0"),
        ({"gpu_memory_utilization": 1.5}, 1, "above 0 and at most 1, not 1.5"),
        ({"gpu_memory_utilization": 0.5, "device": "cpu"}, 1, "is of a GPU, and the device is cpu"),
        ({"gpu_memory_utilization": 0.5, "backend": "hf", "device": "cpu"}, 1, "the hf backend has no gpu_memory"),
        ({"num_processes": 2}, 1, "2 of the 2 processes are on one GPU, and vllm takes most of it for each"),
        ({"num_processes": 5}, 2, "3 of the 5 processes are on one GPU.* at most 0.33"),
        ({"num_processes": 2, "device": "cuda:1"}, 2, "2 of the 2 processes are on one GPU"),
        ({"num_processes": 2, "gpu_memory_utilization": 0.6}, 1, "takes 0.6 of it for each: give .* at most 0.5"),
    ],
)
def test_more_than_a_gpu_has_is_refused(
    checkpoint: Path,
    vllm: type[FakeLLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    gpus: int,
    said: str,
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(UserError, match=said):
        decode_jobs(checkpoint, [make_job(tmp_path / "out.jsonl")], **{"backend": "vllm", "device": "cuda", **options})
    assert vllm.made == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("processes", "gpus", "share"), [(2, 2, None), (4, 2, 0.5), (3, 1, 0.33), (1, 0, None)])
def test_what_a_gpu_has_is_shared(monkeypatch: pytest.MonkeyPatch, processes: int, gpus: int, share: float | None):
    from convexlm.decoding.backends.vllm import VllmBackend

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    VllmBackend().check_gpu_memory(share, "cuda", processes)


def test_on_a_cpu_vllm_is_told_its_memory_and_threads(
    checkpoint: Path, vllm: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("convexlm.decoding.backends.vllm.built_for", lambda: "cpu")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    decode_jobs(checkpoint, [make_job(tmp_path / "cpu.jsonl")], backend="vllm", device="cpu")
    (made,) = vllm.made
    # Keys and values of 2 layers, 32 numbers each in float32.
    assert made["kv_cache_memory_bytes"] == 32768 * 2 * 2 * 32 * 4
    assert (made["enforce_eager"], made["enable_chunked_prefill"], made["max_num_batched_tokens"]) == (
        True,
        False,
        4096,
    )
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    with pytest.raises(UserError, match="is for cpu, and the device is cuda"):
        decode_jobs(checkpoint, [make_job(tmp_path / "gpu.jsonl")], backend="vllm", device="cuda")


def test_an_engine_that_fails_keeps_what_is_done(
    checkpoint: Path, vllm: type[FakeLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answer = vllm.generate

    def fail_later(self: FakeLLM, prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        if len(vllm.asked) == 2:
            raise RuntimeError("EngineCore encountered an issue.\nAnd a stack trace.")
        return answer(self, prompts, params, use_tqdm)

    monkeypatch.setattr(vllm, "generate", fail_later)
    job = make_job(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"vllm failed \(EngineCore encountered an issue.; what else it said is above"):
        decode_jobs(checkpoint, [job], backend="vllm", device="cuda", batch_size=2)
    monkeypatch.setattr(vllm, "generate", answer)
    assert decode_jobs(checkpoint, [job], backend="vllm", device="cuda", batch_size=2)[0].resumed == 4
    assert [row["id"] for row in read(job.output_file)] == [str(number) for number in range(len(SOURCES))]


# The library itself


@needs_vllm
@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 3}, {"min_new_tokens": 4}], ids=str)
def test_vllm_finds_what_hf_finds(checkpoint: Path, tmp_path: Path, options: dict[str, Any]):
    rows = []
    for backend in ("hf", "vllm"):
        decode(checkpoint, tmp_path / f"{backend}.jsonl", backend=backend, **options)
        rows.append(read(tmp_path / f"{backend}.jsonl"))
    assert {row["finished"] for row in rows[0]} >= ({False} if "max_new_tokens" in options else {True})
    assert len({row["hypothesis"] for row in rows[0]}) > 1
    for one, other in zip(*rows, strict=True):
        for key in ("log_prob", "mean_log_prob"):
            assert one.pop(key) == pytest.approx(other.pop(key), abs=1e-4)
        assert one == other


@needs_vllm
def test_a_sweep_loads_one_checkpoint_after_the_other(checkpoint: Path, tmp_path: Path):
    other = make_checkpoint(tmp_path / "checkpoint-50", steps=50, heads=1)
    for backend in ("hf", "vllm"):
        files = [tmp_path / f"{backend}-{number}.jsonl" for number in range(2)]
        folders = zip((checkpoint, other), files, strict=True)
        entries = [CheckpointJobs(folder, [make_job(file)]) for folder, file in folders]
        decode_sweep(entries, backend=backend, device=device(), dtype="float32")
    told = [[row["hypothesis"] for row in read(tmp_path / name)] for name in ("hf-0.jsonl", "hf-1.jsonl")]
    assert told[0] != told[1]
    assert [[row["hypothesis"] for row in read(tmp_path / f"vllm-{number}.jsonl")] for number in range(2)] == told


@needs_vllm
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_samples_of_vllm_follow_the_models_distribution(checkpoint: Path, tmp_path: Path, options: dict[str, Any]):
    from scipy.stats import chisquare
    from transformers import AutoModelForCausalLM

    from test_decoding_sampling import probabilities

    count, source = 2000, SOURCES[2]
    search = {"do_sample": True, "num_return_sequences": count, "max_new_tokens": 1, **options}
    decode(checkpoint, tmp_path / "out.jsonl", [source], **search)
    (row,) = read(tmp_path / "out.jsonl")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (prompt,) = prompt_ids(checkpoint, make_job(tmp_path / "x.jsonl", [source]))
    plain = numpy.log(probabilities(model, prompt, {}, eos=True))
    # A sample is known by its log-probability, which is the model's own, whatever the temperature.
    away = [abs(plain - sample["log_prob"]) for sample in row["samples"]]
    assert max(map(min, away)) < 1e-4
    drawn = [int(numpy.argmin(one)) for one in away]
    seen = numpy.bincount(drawn, minlength=len(plain))
    expected = probabilities(model, prompt, options, eos=True) * count
    assert not seen[expected == 0].any()
    often = expected >= 5
    observed = numpy.array([*seen[often], seen[~often].sum()])
    wanted = numpy.array([*expected[often], expected[~often].sum()])
    kept = wanted > 0
    assert kept.sum() > 2
    assert chisquare(observed[kept], wanted[kept]).pvalue > 1e-4


@needs_vllm
def test_a_sample_of_vllm_does_not_depend_on_its_batch(checkpoint: Path, tmp_path: Path):
    search = {"do_sample": True, "num_return_sequences": 2, "seed": 3}
    decode(checkpoint, tmp_path / "all.jsonl", MANY, **search)
    decode(checkpoint, tmp_path / "few.jsonl", MANY[2:4], **search)
    decode(checkpoint, tmp_path / "other.jsonl", MANY[2:4], **{**search, "seed": 4})

    def texts(name: str) -> list[list[str]]:
        return [[sample["hypothesis"] for sample in row["samples"]] for row in read(tmp_path / name)]

    assert texts("few.jsonl") == texts("all.jsonl")[2:4]
    assert texts("few.jsonl") != texts("other.jsonl")


@needs_vllm
def test_killed_at_any_moment_vllm_leaves_no_process_and_the_next_run_goes_on(checkpoint: Path, tmp_path: Path):
    (tmp_path / "sources.txt").write_text("".join(f"{source}\n" for source in MANY), encoding="utf-8")
    argv = [sys.executable, "-m", "convexlm.cli", "decode", "--model_name_or_path", str(checkpoint), "--pair", "en-de"]
    argv += ["--sources", str(tmp_path / "sources.txt"), "--max_new_tokens", "20", "--backend", "vllm", "--json"]
    argv += ["--dtype", "float32", "--batch_size", "4", "--device", device()]
    whole = subprocess.run([*argv, "--output_file", str(tmp_path / "whole.jsonl")], stdout=subprocess.PIPE, check=True)
    assert json.loads(whole.stdout)["num_sentences"] == len(MANY), "nothing but JSON on stdout"
    assert not engines()
    out = tmp_path / "killed.jsonl"
    # While it loads, once there is a first batch, and a worker of it.
    for moment, whom in (("loading", "all"), ("decoding", "all"), ("decoding", "worker")):
        known = lines(tmp_path)
        process = subprocess.Popen([*argv, "--output_file", str(out)], stdout=subprocess.DEVNULL)
        if moment == "loading":
            wait_for(engines)
        else:
            wait_for(lambda known=known: lines(tmp_path) > known)
        (worker,) = children(process.pid)
        os.kill(process.pid if whom == "all" else worker, signal.SIGKILL)
        assert process.wait() == (-signal.SIGKILL if whom == "all" else 2)
        wait_for(lambda: not engines())
    subprocess.run([*argv, "--output_file", str(out)], stdout=subprocess.DEVNULL, check=True)
    told = [[row["hypothesis"] for row in read(path)] for path in (out, tmp_path / "whole.jsonl")]
    assert told[0] == told[1]


def wait_for(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("killed.jsonl*"))


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def engines() -> list[str]:
    """Processes of vLLM's on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"VLLM::" in (path / "cmdline").read_bytes() and (path / "stat").read_text().split()[2] != "Z":
                found.append(path.name)
    return found


@needs_vllm
def test_what_vllm_cannot_load_is_one_line(tmp_path: Path, checkpoint: Path):
    """Position angles of a kind that it does not know."""
    broken = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "no_such_type", "rope_theta": 1.0}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"vllm cannot load it|cannot be read"):
        decode(broken, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert not engines()
