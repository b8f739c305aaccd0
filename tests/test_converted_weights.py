"""Mixtures of experts, whose checkpoints name weights otherwise than the model does: resumed, and the best one."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convexlm.converted_weights import has_other_names, load_as_transformers_does
from test_fused_forward import family
from trainer_helpers import assert_same_weights, logged, make, trained
from training_helpers import rows, tiny_model

SAVED = {"logging_steps": 4, "save_strategy": "steps", "save_steps": 3, "max_steps": 4}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phimoe"])
def test_a_resumed_mixture_goes_on_with_its_experts(tmp_path, name):
    """From a save between two logs; the load-balancing loss that is logged is that of all the steps, too."""
    whole = trained(tmp_path / "a", rows(16), model=family(name), **SAVED)
    again = make(tmp_path / "b", rows(16), model=family(name), **SAVED)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for figure in ("loss", "aux_loss", "nll"):
        torch.testing.assert_close(logged(again, figure), logged(whole, figure), rtol=0, atol=0)
    assert_same_weights(again, whole, rtol=0, atol=0)


def test_the_best_mixture_is_loaded_whole(tmp_path):
    run = make(tmp_path, rows(16), model=family("mixtral"), eval_data=rows(5, seed=4), max_steps=3, eval_steps=1,
               save_steps=1, save_strategy="steps", eval_strategy="steps", load_best_model_at_end=True,
               metric_for_best_model="entropy", greater_is_better=False, learning_rate=3.0)  # fmt: skip
    run.train()
    best = min((line for line in run.state.log_history if "eval_entropy" in line), key=lambda x: x["eval_entropy"])
    assert best["step"] < 3
    for name in ("eval_entropy", "eval_loss", "eval_aux_loss"):
        assert run.evaluate()[name] == pytest.approx(best[name], rel=1e-6)


def test_weights_keep_every_digit_and_tied_ones_are_no_reason(tmp_path):
    model = family("mixtral").to(torch.bfloat16)
    model.lm_head.float().weight.data += 1e-5  # bfloat16 would lose it
    model.save_pretrained(tmp_path / "mixed")
    other = family("mixtral").to(torch.bfloat16)
    other.lm_head.float()
    assert has_other_names(other, tmp_path / "mixed")
    load_as_transformers_does(other, tmp_path / "mixed")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and other.state_dict()[name].dtype == value.dtype
    tied = tiny_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert not has_other_names(tied, tmp_path / "tied") and not has_other_names(tied, tmp_path)


def test_weights_that_are_not_there_are_an_error(tmp_path):
    family("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        lost = [name for name in opened.keys() if "layers.1" in name and "experts" in name]  # noqa: SIM118
    save_file({k: v for k, v in load_file(file).items() if k not in lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="2 weights of the model are not in it, such as `model.layers.1.mlp.experts"):
        load_as_transformers_does(family("mixtral"), tmp_path)
