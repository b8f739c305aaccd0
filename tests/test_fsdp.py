"""What FSDP cannot train, save or go on from is told in one line; tied embeddings stay apart where one is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from convexlm.errors import UserError
from convexlm.fsdp import (
    asks_for_fsdp,
    optimizer_not_sharded,
    refuse_adapters_under_fsdp,
    saves_whole_states,
    untie_trained_copies,
)
from convexlm.launch.engine import refuse_another_engine, set_up
from trainer_helpers import make
from training_helpers import rows, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

FSDP_VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_STATE_DICT_TYPE")


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what accelerate's launcher sets for FSDP."""

    def use(**variables: str) -> None:
        for name in FSDP_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which accelerate's plugin sets
        for name, value in variables.items():
            monkeypatch.setenv(f"FSDP_{name}", value)

    return use


def adapted(*, tied: bool, **options: Any) -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
    return peft.get_peft_model(tiny_model(tie_word_embeddings=tied), config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize(
    ("tied", "options", "whole", "told"),
    [
        (False, {}, False, "SHARDED_STATE_DICT.*set `fsdp_state_dict_type: FULL_STATE_DICT`"),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, "`ensure_weight_tying` on a"),
        (True, {"trainable_token_indices": [5, 6]}, True, "`trainable_token_indices` on a model whose"),
        (False, {"trainable_token_indices": [5, 6]}, True, None),
        (True, {"modules_to_save": ["embed_tokens"]}, True, None),
    ],
)
def test_adapters_that_would_be_another_model(tied: bool, options: Any, whole: bool, told: str | None) -> None:
    model = adapted(tied=tied, **options)
    if told is None:
        refuse_adapters_under_fsdp(model, whole_states=whole)
        return
    with pytest.raises(ValueError, match=told) as error:
        refuse_adapters_under_fsdp(model, whole_states=whole)
    assert "\n" not in str(error.value)


def test_a_model_without_an_adapter_may_be_saved_as_shards() -> None:
    refuse_adapters_under_fsdp(tiny_model(), whole_states=False)
    untie_trained_copies(tiny_model())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("trained", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_a_trained_copy_is_not_tied_anew(trained: list[str]) -> None:
    model = adapted(tied=True, modules_to_save=trained)
    base = model.get_base_model()
    before = base.get_output_embeddings().weight.detach().clone()
    untie_trained_copies(model)
    base.tie_weights()  # as accelerate does while it shards
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    assert inner.weight is not outer.weight and torch.equal(outer.weight, before)
    assert [inner.weight.requires_grad, outer.weight.requires_grad] == [
        name in trained for name in ("embed_tokens", "lm_head")
    ]


def test_tied_embeddings_that_no_adapter_trains_stay_one_tensor() -> None:
    model = adapted(tied=True)
    untie_trained_copies(model)
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight and base.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["adagrad", "adafactor"])
def test_optimizers_that_are_not_sharded(name: str, fsdp: Any, tmp_path: Path) -> None:
    config = SimpleNamespace(optim=name, world_size=1, n_gpu=1, device=torch.device("cpu"))
    assert not asks_for_fsdp(config) and optimizer_not_sharded(config) is None
    fsdp()
    with pytest.raises(UserError, match=f"`optim` {name} does not go with FSDP"):
        set_up(config)
    with pytest.raises(ValueError, match=f"`optim` {name} does not go with FSDP"):
        make(tmp_path, rows(8), optim=name)
    assert optimizer_not_sharded(SimpleNamespace(optim="adamw_torch")) is None


@pytest.mark.parametrize(
    ("variables", "options", "whole"),
    [
        ({"VERSION": "2", "STATE_DICT_TYPE": "FULL_STATE_DICT"}, None, True),
        ({"VERSION": "2", "STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, None, False),
        ({"VERSION": "2"}, None, False),
        ({}, None, True),
        ({}, {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}, True),
        ({}, {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}, False),
    ],
)
def test_what_is_saved_is_read_as_accelerate_reads_it(fsdp: Any, variables: Any, options: Any, whole: bool) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    fsdp(**variables)
    assert saves_whole_states(SimpleNamespace(fsdp_plugin_args=options)) == whole
    plugin = FullyShardedDataParallelPlugin(**(options or {}))
    assert ("FULL_STATE_DICT" in str(plugin.state_dict_type)) == whole


@pytest.mark.parametrize(
    ("kind", "files", "other", "told"),
    [
        ("FULL", ["optimizer.bin", "model.safetensors"], "SHARDED", "such as fsdp2; or begin a new .*_path {last}"),
        ("FULL", ["optimizer.bin", "adapter_config.json"], "SHARDED", "--output_dir DIR --merge_adapter` and begin"),
        ("SHARDED", [], "FULL", "export --checkpoint {last} --output_dir DIR --base_model MODEL` and begin"),
        ("SHARDED", ["config.json"], "FULL", "export --checkpoint {last} --output_dir DIR` and begin"),
    ],
)
def test_only_the_same_kind_of_states_goes_on(
    kind: str, files: list[str], other: str, told: str, fsdp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = tmp_path / "checkpoint-10"
    last.mkdir()
    for name in ["pytorch_model_fsdp.bin" if kind == "FULL" else "pytorch_model_fsdp_0", *files]:
        (last / name).touch()
    monkeypatch.setattr("convexlm.checkpoints.complete_checkpoints", lambda folder: [last])
    fsdp(VERSION="2", STATE_DICT_TYPE=f"{kind}_STATE_DICT")
    refuse_another_engine(tmp_path, resume=True, config=SimpleNamespace())
    fsdp(VERSION="2", STATE_DICT_TYPE=f"{other}_STATE_DICT")
    with pytest.raises(UserError, match=f"{other}_STATE_DICT cannot go on from it: .*{kind}_STATE_DICT`.*") as error:
        refuse_another_engine(tmp_path, resume=True, config=SimpleNamespace())
    assert error.match(told.format(last=last))
