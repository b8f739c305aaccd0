"""How an accelerate file or a launcher's variables divide a model, DeepSpeed's own file included."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.errors import UserError
from convexlm.launch.environment import _offloads
from convexlm.launch.settings import config_file
from convexlm.launch.sharding import deepspeed_settings, sharding_here, sharding_of_file
from convexlm.memory import SHARDINGS
from convexlm.options import load_yaml

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("single_gpu", "none"),
        ("multi_gpu", "ddp"),
        ("fsdp2", "fsdp2"),
        ("zero2", "zero2"),
        ("zero3", "zero3"),
        ("zero3_offload", "zero3_offload"),
    ],
)
def test_every_packaged_launch_has_its_sharding(name: str, sharding: str) -> None:
    processes = 1 if name == "single_gpu" else 4
    assert sharding_of_file(load_yaml(config_file(name)), processes) == sharding


ZERO: list[tuple[Any, Any, Any, str]] = [
    (1, None, None, "zero1"),
    (1, "cpu", None, "zero1_offload"),
    (2, "none", "none", "zero2"),
    (2, "cpu", "cpu", "zero2_offload"),
    (3, None, None, "zero3"),
    (3, "cpu", "none", "zero3_offload_optimizer"),
    (3, "none", "cpu", "zero3_offload_parameters"),
    (3, "cpu", "cpu", "zero3_offload"),
    (3, "nvme", "cpu", "zero3 with offloading to nvme"),
    (0, None, None, "ddp"),
    ("auto", "auto", None, "zero2"),
]


@pytest.mark.parametrize(("stage", "optimizer", "parameters", "sharding"), ZERO)
def test_every_way_to_tell_zero_is_read_alike(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Any,
    optimizer: str | None,
    parameters: str | None,
    sharding: str,
) -> None:
    said = {"zero_stage": stage, "offload_optimizer_device": optimizer, "offload_param_device": parameters}
    said = {key: value for key, value in said.items() if value is not None}
    assert sharding_of_file({"distributed_type": "DEEPSPEED", "deepspeed_config": said}, 4) == sharding
    own: dict[str, Any] = {"stage": stage}
    own.update({"offload_optimizer": {"device": optimizer}} if optimizer else {})
    own.update({"offload_param": {"device": parameters}} if parameters else {})
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": own, "train_batch_size": "auto"}))
    file = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}}
    assert sharding_of_file(file, 4) == sharding
    (tmp_path / "file.yaml").write_text(json.dumps(file))
    assert _offloads(str(tmp_path / "file.yaml")) == (deepspeed_settings(file)[1:] != ("none", "none"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert sharding_here(4) == sharding
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    for key, value in said.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key.upper()}", str(value))
    assert sharding_here(4) == sharding


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        ("{", "line 1: not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "has no `zero_optimization`"),
        ('{"zero_optimization": 3}', "`zero_optimization` is a mapping"),
        ('{"zero_optimization": {"stage": 4}}', "stage of ZeRO is 0, 1, 2 or 3, not 4"),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', "`offload_param` is a mapping"),
        ('{"zero_optimization": {"offload_param": {"device": "moon"}}}', "none, cpu or nvme, not 'moon'"),
    ],
)
def test_a_damaged_deepspeed_file_is_told_in_one_line(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    file = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(path)}}
    with pytest.raises(UserError, match=told) as error:
        sharding_of_file(file, 4)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sharding"),
    [
        ({}, "fsdp2"),
        ({"fsdp_version": 2, "fsdp_offload_params": True}, "fsdp2_offload"),
        ({"fsdp_offload_params": "false"}, "fsdp2"),
        ({"fsdp_version": 1, "fsdp_sharding_strategy": "FULL_SHARD"}, "fsdp2"),
        ({"fsdp_version": 1, "fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "FSDP with SHARD_GRAD_OP"),
        ({"fsdp_version": 2, "fsdp_reshard_after_forward": False}, "FSDP that keeps gathered weights"),
    ],
)
def test_fsdp(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sharding: str) -> None:
    found = sharding_of_file({"distributed_type": "FSDP", "fsdp_config": settings}, 4)
    assert found.startswith(sharding) and (found in SHARDINGS) == (sharding in SHARDINGS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key, value in settings.items():
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    assert sharding_here(4) == found


def test_what_is_not_counted_is_named() -> None:
    assert sharding_of_file({"distributed_type": "MEGATRON_LM"}, 4) == "MEGATRON_LM"
    assert sharding_of_file({"distributed_type": False}, 1) == "none"
    with pytest.raises(UserError, match="`deepspeed_config` is a mapping"):
        sharding_of_file({"distributed_type": "DEEPSPEED", "deepspeed_config": "x.json"}, 4)
