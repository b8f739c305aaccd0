"""Decoding at LLaMA-7B's shape on one GPU: the reference's loop, `convexlm decode`, and the share of memory bandwidth.

    PYTHONPATH=src python benchmarks/decoding_gpu.py --output $OUT/decoding_gpu.json   # about 5 minutes, no network
    PYTHONPATH=src python benchmarks/decoding_gpu.py --shape tiny --device cpu --num_sentences 6 \
        --reference_sentences 4 --repeats 1 --output x.json                            # that it runs

No 7B checkpoint is needed. The weights are made so that greedy search counts: after token i comes token i + 1, up to a
token after which EOS comes. So the last token of a prompt says how long its answer is, in every system, while all
layers compute what they always do. Answers are as long as lognormal numbers say, 37 tokens on average and 96 at
most. The hypotheses are checked against the lengths that were asked for.

The reference's loop takes a part of the sentences, in file order, 4 at a time; ours takes all of them, as it does in
use: sorting and batching need something to sort. Loading, hashing and conversion are not timed. The share of memory
bandwidth is that of greedy search at several batch sizes: bytes of weights and of keys and values that a step has to
read, over its time, over what a copy of 4 GB reaches on this device and over the device's nominal figure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from convexlm.decoding import DecodeJob, Search, decode_jobs
from convexlm.decoding.generation import Prefix, Rows
from convexlm.templates import register_template
from convexlm.testsets import TestSet
from convexlm.tokenization import PromptSettings
from decoding import Reference

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VOCABULARY, BOS, EOS, LONGEST = 32000, 1, 2, 96
SURE = 19.0
"""The logit of the token that comes next; all others' are about 0."""
NOMINAL = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.039e12}
"""Bytes a second, from the makers' data sheets (SXM)."""
SEARCHES = {"beam search as the reference's": {"num_beams": 4, "no_repeat_ngram_size": 12}, "greedy search": {}}
HEAD = " ".join(f"t{VOCABULARY - 1 - number % 9}" for number in range(60))
"""The instruction that all prompts share, in leftover tokens."""

register_template("counting", "{instruction} {input}")


def start_of(length: int) -> int:
    """The token after which an answer of `length` tokens, EOS included, comes."""
    return 3 + length * (length - 1) // 2


def make_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Random layers around an embedding and a head that count."""
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.01)  # what layers add does not drown the token
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedding.normal_()
        head.normal_(std=0.1 * SURE / config.hidden_size)
        # The last token of every answer, and all that are in none, look alike: EOS comes after them.
        last = [start_of(length) + length - 1 for length in range(1, LONGEST + 1)]
        stop = torch.tensor([0, BOS, EOS, *last, *range(start_of(LONGEST + 1), VOCABULARY)], device=device)
        direction = torch.randn(config.hidden_size, device=device, dtype=torch.float32).to(dtype)
        embedding[stop] = direction
        going = torch.ones(VOCABULARY, dtype=torch.bool, device=device)
        going[stop] = False
        (tokens,) = going.nonzero(as_tuple=True)
        head[tokens + 1] = embedding[tokens] * (SURE / config.hidden_size)
        head[EOS] = direction * (SURE / config.hidden_size)
    return model


def make_folder(folder: Path, model: Any) -> None:
    """A checkpoint's folder as far as decoding reads it, with a tokenizer of words `t0`, `t1`, ...; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    names = {"unk_token": "t0", "bos_token": f"t{BOS}", "eos_token": f"t{EOS}", "pad_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    model.config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")


def make_sentences(count: int, seed: int = 1) -> tuple[TestSet, list[int]]:
    """Sources of leftover tokens with the length of the answer at their end, and those lengths."""
    chance = random.Random(seed)
    lengths = [min(LONGEST, max(4, round(chance.lognormvariate(3.45, 0.6)))) for _ in range(count)]
    sources = []
    for length in lengths:
        words = [f"t{chance.randrange(start_of(LONGEST + 1), VOCABULARY)}" for _ in range(max(2, length))]
        sources.append(" ".join([*words, f"t{start_of(length)}"]))
    return TestSet("counting", "en-de", sources, [], [str(number) for number in range(count)]), lengths


def ours(folder: Path, model: Any, job: DecodeJob, device: str, dtype: str, backend: str = "hf") -> dict[str, Any]:
    """Seconds and tokens of a whole job, from the first batch to the last."""
    times: list[float] = []
    kept = model
    with patch("convexlm.decoding.loading.load_model", lambda *args, **options: kept):
        decode_jobs(
            folder,
            [job],
            backend=backend,
            device=device,
            dtype=dtype,
            progress=lambda state: times.append(time.perf_counter()),
        )
    rows = [json.loads(line) for line in job.output_file.read_text(encoding="utf-8").split("\n")[:-1]]
    return {"seconds": times[-1] - times[0], "lengths": [row["tokens"] for row in rows]}


def bandwidth(device: str) -> float | None:
    """Bytes a second that a copy of 4 GB reads and writes; None on a CPU."""
    if device == "cpu":
        return None
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * source.numel() / min(times)


def step_times(model: Any, batch: int, prompt: int, steps: int, peaks: dict[str, float | None]) -> dict[str, Any]:
    """Greedy steps of our loop at one batch size: what they take, and how much of the bandwidth that is."""
    config, size = model.config, model.dtype.itemsize
    prompts = [[VOCABULARY - 1 - (row + place) % 50 for place in range(prompt)] for row in range(batch)]
    times = []
    with torch.inference_mode():
        rows = Rows(model, prompts, 0, Prefix(model, prompts))
        for _ in range(steps):
            chosen = rows.logits.argmax(dim=1)
            begun = time.perf_counter()
            rows.step(chosen[:, None])
            rows.logits.argmax(dim=1).tolist()  # waits for the device, as a search does
            times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    cached = (
        2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    )
    moved = size * (weights + batch * (prompt + steps // 2) * cached)
    shares = {f"share_of_{name}": round(moved / seconds / peak, 3) for name, peak in peaks.items() if peak}
    return {
        "batch": batch,
        "milliseconds_a_step": round(1e3 * seconds, 2),
        "milliseconds_p10_p90": [round(1e3 * x, 2) for x in statistics.quantiles(times, n=10)[::8]],
        "tokens_per_second": round(batch / seconds, 1),
        "gigabytes_a_step": round(moved / 1e9, 2),
        **shares,
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num_sentences", type=int, default=384)
    parser.add_argument("--reference_sentences", type=int, default=48, help="of them, for the reference's loop")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240.0, help="nothing is repeated after so long")
    parser.add_argument("--output", required=True, help="the JSON file")
    args = parser.parse_args()
    begun = time.perf_counter()
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    model = make_model(args.shape, args.device, getattr(torch, dtype))
    test_set, lengths = make_sentences(args.num_sentences)
    part, _ = make_sentences(args.reference_sentences)
    settings = PromptSettings(template="counting", add_bos=False)
    name = torch.cuda.get_device_name(0) if args.device != "cpu" else "CPU"
    peaks = {"copy": bandwidth(args.device), "nominal": next((v for k, v in NOMINAL.items() if k in name), None)}
    found: dict[str, Any] = {
        "command": "python benchmarks/decoding_gpu.py " + " ".join(sys.argv[1:]),
        "device": name,
        "shape": args.shape,
        "dtype": dtype,
        "versions": {name: __import__(name).__version__ for name in ("torch", "transformers")},
        "bytes_a_second": peaks,
        "steps": [],
        "searches": {},
    }

    def keep() -> None:
        found["seconds"] = round(time.perf_counter() - begun, 1)
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for batch in (1, 8, 64) if args.device != "cpu" else (1, 4):
        found["steps"].append(step_times(model, batch, 100, 40, peaks))
        print(found["steps"][-1], flush=True)
        keep()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        make_folder(folder, model)
        reference = Reference(folder, settings, model)

        def job(options: dict[str, Any], sentences: TestSet) -> DecodeJob:
            search = Search(**options, max_new_tokens=128)
            return DecodeJob(sentences, search, Path(temporary) / f"{time.monotonic_ns()}.jsonl", settings, HEAD)

        runs: dict[str, dict[str, list[dict[str, Any]]]] = {title: {} for title in SEARCHES}
        for repeat in range(args.repeats + 1):  # the first one warms up, with a few sentences
            few = make_sentences(4)[0]
            for title, options in SEARCHES.items():
                if repeat > 1 and time.perf_counter() - begun > args.seconds:
                    continue
                seconds, texts, tokens = reference.decode(job(options, part if repeat else few), 0, "wall")
                own = ours(folder, model, job(options, test_set if repeat else few), args.device, dtype)
                if not repeat:
                    continue
                right = sum(len(text.split("t")) == n for text, n in zip(texts, lengths, strict=False))
                runs[title].setdefault("reference loop", []).append(
                    {"seconds": seconds, "tokens": tokens, "sentences": len(texts), "as_asked": right}
                )
                right = sum(a == b for a, b in zip(own["lengths"], lengths, strict=True))
                runs[title].setdefault("hf", []).append(
                    {
                        "seconds": own["seconds"],
                        "tokens": sum(own["lengths"]),
                        "sentences": len(lengths),
                        "as_asked": right,
                    }
                )
                found["searches"][title] = {system: _summary(of) for system, of in runs[title].items()}
                both = found["searches"][title]
                both["times_the_reference"] = round(
                    both["hf"]["tokens_per_second"] / both["reference loop"]["tokens_per_second"], 2
                )
                print(title, json.dumps(both), flush=True)
                keep()
        found["vllm"] = "not installed"
        if args.device != "cpu" and importlib.util.find_spec("vllm"):
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder)
            own = ours(folder, model, job({}, test_set), args.device, dtype, backend="vllm")
            found["vllm"] = {"tokens_per_second": round(sum(own["lengths"]) / own["seconds"], 1)}
    keep()


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates over the repeats; how many answers were as long as asked for."""
    return {
        "seconds": [round(run["seconds"], 2) for run in runs],
        "sentences": runs[0]["sentences"],
        "sentences_per_second": round(statistics.median(run["sentences"] / run["seconds"] for run in runs), 2),
        "tokens_per_second": round(statistics.median(run["tokens"] / run["seconds"] for run in runs), 1),
        "answers_as_long_as_asked": [run["as_asked"] for run in runs],
    }


if __name__ == "__main__":
    main()
