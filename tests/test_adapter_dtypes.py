"""Adapters in another dtype than PEFT gives them, as those of quantized models are; see test_quantized.py."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from convexlm import ConvexConfig, ConvexTrainer
from convexlm.quantized import bits_trained_on, keep_gradients
from training_helpers import tiny_config, tiny_tokenizer


def trained(folder, steps, resume=False, **options):
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(tiny_config()), adapter, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    rows = [{"input_ids": [1, 5 + i, 6 + i, 2], "labels": [-100, -100, 6 + i, 2]} for i in range(16)]
    args = ConvexConfig(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to="none", lr_scheduler_type="constant", learning_rate=1e-2, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = ConvexTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return load_file(folder / f"checkpoint-{steps}" / "adapter_model.safetensors")


def test_a_training_that_goes_on_leaves_an_adapter_its_dtype(tmp_path):
    trained(tmp_path / "run", 2)
    got, wanted = trained(tmp_path / "run", 4, resume=True), trained(tmp_path / "whole", 4)
    assert {x.dtype for x in wanted.values()} == {torch.bfloat16}
    assert got.keys() == wanted.keys()
    assert all(got[name].dtype == x.dtype and torch.equal(got[name], x) for name, x in wanted.items())


def test_no_weight_is_packed_into_a_form_without_a_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].support_avx512bf16_for_cpu = True  # as of bitsandbytes' Linear4bit
    keep_gradients(model)
    assert model[1].support_avx512bf16_for_cpu is False
    assert not hasattr(model[0], "support_avx512bf16_for_cpu")


@pytest.mark.parametrize(
    ("marker", "bits"),
    [
        ('{"training": {"load_in_4bit": true, "load_in_8bit": false}}', 4),
        ('{"training": {"load_in_8bit": true}}', 8),
        ('{"training": {"load_in_4bit": false}}', None),
        ('{"training": null}', None),
        ("{}", None),
        (None, None),
    ],
)
def test_a_checkpoint_says_in_how_many_bits_its_base_was(tmp_path, marker, bits):
    if marker is not None:
        (tmp_path / "convexlm.json").write_text(marker)
    assert bits_trained_on(tmp_path) == bits
