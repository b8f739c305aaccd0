"""LLaMA-7B's shape, random weights, one GPU: tokens/s, MFU and peak memory of whole trainings beside the estimate.

    python benchmarks/large_models.py --data DATA --output results/large_models.json

Full fine-tuning in bf16, LoRA, and LoRA on weights of 4 bits (QLoRA: nf4, double quantization; needs bitsandbytes),
each with MLE and convex, 30 steps on padded batches of Alpaca records, a process each; about six minutes on an H100 or
H200, with --seconds as the limit of all. `--model 58m --batch 4 --steps 3` runs them on a CPU, to see that they run.
QLoRA writes its 13 GB of base weights to TMPDIR first. The head and single steps are compared by training.py.

MFU is the useful FLOPs of the tokens that are no padding (2 a parameter forward, 2 for the gradient by activations, 2
for that by weights where they are trained, and attention's; recomputed layers not counted), over the GPU's dense bf16
peak. Memory is what CUDA has allocated (`allocated`, what `estimate_memory(...).peak` is about) and reserved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNS = {f"{kind}, {name}": (kind, name) for kind in ("full", "lora", "qlora") for name in ("mle", "convex")}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the makers' data sheets
MAX_LENGTH = 512
NOT_COUNTED = 5  # steps at the beginning


def main() -> None:
    """Run what was asked for, one process after another; write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", default=os.environ.get("CONVEXLM_SHARED_DATA"), help="folder with alpaca, tokenizers"
    )
    parser.add_argument("--model", default="7b", help="58m, 110m or 7b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seconds", type=float, default=360.0, help="begin no further run after so many")
    parser.add_argument("--output", type=Path, default=Path("results/large_models.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.data:
        parser.error("--data is needed: a folder with alpaca/ and tokenizers/")
    if args.child:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever libraries print is not an answer
        print(json.dumps(measure(args.child, args)), file=answers, flush=True)
        return
    begun, rows = time.monotonic(), []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.runs:
        if time.monotonic() - begun > args.seconds:
            rows.append({"run": name, "not_measured": f"{args.seconds:.0f} s were over"})
            continue
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            capture_output=True,
            text=True,
            check=False,
        )
        failed = {"run": name, "not_measured": (done.stderr.strip().split("\n") or ["?"])[-1]}
        rows.append(json.loads(done.stdout) if done.returncode == 0 else failed)
        args.output.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({key: value for key, value in rows[-1].items() if not isinstance(value, (list, dict))}))


def about() -> dict[str, Any]:
    """Command, versions and machine."""
    from training import _about

    return {**_about(), "command": " ".join(["python", "benchmarks/large_models.py", *sys.argv[1:]])}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One training; its speed and memory, and what the dry run would have said."""
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from convexlm import ConvexConfig, ConvexTrainer
    from convexlm.memory import estimate_memory
    from convexlm.tokenizer_files import load_tokenizer
    from training_steps import SHAPES, _dataset

    kind, objective = RUNS[name]
    lora = kind != "full"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, pad_token_id=0, **SHAPES[args.model])
    settings = {"data": args.data, "layout": "padded", "batch": args.batch, "rows": 0, "steps": args.steps}
    dataset = _dataset(settings)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    if kind == "qlora":
        model = in_four_bits(model)
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = _now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(_now(device) - self.start)

    with tempfile.TemporaryDirectory() as folder:
        training = ConvexConfig(
            folder,
            objective=objective,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            max_length=MAX_LENGTH,
            gradient_checkpointing=True,
            optim="adamw_torch_fused",
            learning_rate=1e-5,
            use_cpu=device == "cpu",
            bf16=device == "cuda",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = ConvexTrainer(
            model=model,
            args=training,
            train_dataset=dataset,
            processing_class=load_tokenizer(Path(args.data) / "tokenizers" / "tokenizer.model"),
            peft_config=peft_config,
            callbacks=[Clock()],
        )
        del model
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    total = [line["num_tokens"] for line in logs]
    tokens = [now - then for now, then in zip(total, [0, *total], strict=False)]
    longest = max(len(row) for row in dataset["input_ids"])
    estimate = estimate_memory(
        config,
        batch=args.batch,
        length=longest,
        dtype="bfloat16",
        mixed_precision="bf16" if device == "cuda" else None,
        peft_config=peft_config,
        quantized="4bit" if kind == "qlora" else None,
        double_quantized=kind == "qlora",
        device=device,
        device_bytes=torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
    )
    counted, timed = tokens[NOT_COUNTED:] or tokens, seconds[NOT_COUNTED:] or seconds
    useful = sum(counted) * flops_per_token(config, sum(counted) / len(counted) / args.batch, trained=not lora)
    peak = next((flops for card, flops in PEAK_FLOPS.items() if card in _card(device)), None)
    allocated = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "run": name,
        "card": _card(device),
        "parameters": estimate.parameters,
        "trainable": estimate.trainable,
        "batch": args.batch,
        "longest": longest,
        "steps": len(seconds),
        "loss": [logs[0]["loss"], logs[-1]["loss"]],
        "nll": [logs[0]["nll"], logs[-1]["nll"]],
        "finite": all(line["loss"] == line["loss"] for line in logs),
        "seconds_per_step": statistics.median(timed),
        "tokens_per_second": sum(counted) / sum(timed),
        "mfu": useful / sum(timed) / peak if peak else None,
        "allocated_peak": allocated,
        "reserved_peak": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "estimated_peak": estimate.peak,
        "estimate_error": estimate.peak / allocated - 1 if allocated else None,
        "estimate": estimate.as_dict(),
        "seconds": seconds,
        "tokens": tokens,
    }


def in_four_bits(model: Any) -> Any:
    """The model by way of a checkpoint, as `--load_in_4bit` loads one; the given one's memory is freed."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        device = model.device
        model.to("meta")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        where = {"": 0 if device.type == "cuda" else "cpu"}
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=bits, dtype=torch.bfloat16, device_map=where
        )


def flops_per_token(config: Any, length: float, *, trained: bool) -> float:
    """Useful FLOPs of a token in a sequence of `length`, forward and backward."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    matrices = layers * (4 * hidden**2 + 3 * hidden * config.intermediate_size) + hidden * config.vocab_size
    causal_attention = 2 * 2 * layers * hidden * length / 2
    return (6 if trained else 4) * matrices + 3 * causal_attention


def _card(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "none (CPU)"


def _now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
