"""Merging where input and output embeddings are one tensor: each side keeps what the adapter made of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from convexlm.adapters import merge_adapter
from convexlm.decoding.loading import load_model
from convexlm.errors import UserError
from convexlm.export import export_checkpoint
from training_helpers import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def adapted(folder: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter on a model that ties its embeddings, and the logits it gives."""
    tiny_model(tie_word_embeddings=True).save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=4, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", logits(model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}, True),
    ],
)
def test_a_merged_model_answers_as_the_adapter_on_its_base(
    tmp_path: Path, options: dict[str, Any], tied: bool
) -> None:
    adapter, expected = adapted(tmp_path, **options)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), expected, atol=1e-2)
    export_checkpoint(adapter, tmp_path / "out", merge_adapter=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert torch.allclose(logits(load_model(adapter, "cpu", torch.float32, merge_adapter=True)), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_a_tie_that_no_config_undoes_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tie_word_embeddings=False)
    first, second = (layer.self_attn.q_proj for layer in base.model.layers)
    second.weight = first.weight
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["layers.0.self_attn.q_proj"]))
    assert isinstance(model, PeftModel)
    with pytest.raises(UserError, match=r"cannot be merged: `model\.layers\.0\.self_attn\.q_proj` shares its weight"):
        merge_adapter(model)
