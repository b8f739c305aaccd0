"""QLoRA: an adapter on base weights that bitsandbytes keeps in 4 or 8 bits, here on the CPU.

    pip install -e ".[quantization]"; OMP_NUM_THREADS=1 python -m pytest tests/test_quantized.py

It is no part of what `make test` installs, for it makes every import of PEFT two seconds longer.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from convexlm.cli import main
from convexlm.decoding.store import meta_path
from convexlm.export import export_checkpoint
from convexlm.metrics_file import read_metrics
from training_helpers import tiny_config, tiny_tokenizer, train, write_records

pytest.importorskip("bitsandbytes", reason='needs bitsandbytes (pip install -e ".[quantization]")')


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model, and the same with the numbers that its 4 bits stand for."""
    folder = tmp_path_factory.mktemp("files")
    config = tiny_config()
    config.hidden_size, config.intermediate_size, config.head_dim = 128, 256, 32  # which 4 bits are packed for
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=bits, dtype=torch.float32)
    model.dequantize().float().save_pretrained(folder / "dequantized")
    for name in ("base", "dequantized"):
        tiny_tokenizer().save_pretrained(folder / name)
    write_records(folder / "data.jsonl", 16)
    write_records(folder / "eval.jsonl", 6, seed=3)
    return folder


def run(files, folder, *words, model="base", **options):
    given = {
        **{"model_name_or_path": files / model, "dataset": files / "data.jsonl", "eval_dataset": files / "eval.jsonl"},
        **{"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]},
        **{"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 4, "save_steps": 4},
        **{
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "optim": "adamw_torch",
            **options,
        },
    }
    assert train(folder, *words, **given) == 0
    return folder


def column(folder, name):
    return torch.tensor([row[name] for row in read_metrics(folder) if name in row], dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    options = {"load_in_4bit": True, "objective": "convex", "k": 1.0}
    return run(files, tmp_path_factory.mktemp("run") / "run", **options)


def test_four_bits_train_as_the_numbers_that_they_stand_for(files, trained, tmp_path):
    plain = run(files, tmp_path / "plain", model="dequantized", objective="convex", k=1.0)
    # TRL keeps the adapter of a quantized model in bfloat16, so steps agree to its rounding; the start has no adapter.
    assert torch.allclose(column(trained, "eval_nll")[0], column(plain, "eval_nll")[0], rtol=1e-5)
    for name in ("grad_norm", "nll", "eval_nll"):
        got, wanted = column(trained, name), column(plain, name)
        assert torch.allclose(got, wanted, rtol=0.02), (name, got, wanted)
    learned = [column(one, "eval_nll")[0] - column(one, "eval_nll")[-1] for one in (trained, plain)]
    assert learned[1] > 0.1 and torch.isclose(*learned, rtol=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_leaves_the_gradient(files, tmp_path, bits):
    folder = run(files, tmp_path / "run", **{f"load_in_{bits}bit": True})
    norms = column(folder, "grad_norm")
    assert len(norms) == 4 and (norms > 0).all()


def test_it_goes_on_to_the_same_weights(files, trained, tmp_path):
    options = {"load_in_4bit": True, "objective": "convex", "k": 1.0, "save_steps": 2}
    run(files, tmp_path / "run", **{**options, "max_steps": 2}, lr_scheduler_type="constant")
    run(files, tmp_path / "run", "--resume", **options, lr_scheduler_type="constant")
    whole = run(files, tmp_path / "whole", **options, lr_scheduler_type="constant")
    parts = [(one / "checkpoint-4" / "adapter_model.safetensors").read_bytes() for one in (tmp_path / "run", whole)]
    assert parts[0] == parts[1]


def test_decoding_and_export_say_that_the_base_is_another(trained, tmp_path, capfd):
    checkpoint = trained / "checkpoint-4"
    (tmp_path / "sources.txt").write_text("w1 w2\nw3\n")
    output = tmp_path / "out.jsonl"
    words = ["decode", "--model_name_or_path", checkpoint, "--sources", tmp_path / "sources.txt", "--pair", "en-de"]
    words += ["--output_file", output, "--max_new_tokens", "3", "--num_beams", "1", "--backend", "hf"]
    capfd.readouterr()
    assert main([str(word) for word in words]) == 0
    told = "adapters trained on 4-bit base weights are decoded on the base model's own, unquantized"
    assert capfd.readouterr().err.count(told) == 1
    assert json.loads(meta_path(output).read_text())["trained_on_bits"] == 4
    export_checkpoint(checkpoint, tmp_path / "merged", merge_adapter=True)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "The adapter was trained on the base's weights in 4 bits. This is that base's own weights with" in card
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("quantization_config") is None
