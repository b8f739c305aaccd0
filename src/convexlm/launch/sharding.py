"""How an accelerate file, or the launcher of this process, divides a model over processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.files import read_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping


def sharding_here(processes: int) -> str:
    """How the launcher of this process (or none) divides a model, by the variables that it has set.

    Raises:
        UserError: DeepSpeed's settings cannot be read.
    """
    told = {key.lower(): value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    if told.get("accelerate_use_deepspeed", "").lower() == "true":
        known = ("zero_stage", "offload_optimizer_device", "offload_param_device")
        settings = {key: told[f"accelerate_deepspeed_{key}"] for key in known if f"accelerate_deepspeed_{key}" in told}
        if (file := told.get("accelerate_deepspeed_config_file", "none")) not in ("", "none", "None"):
            settings["deepspeed_config_file"] = file
        return sharding_of_file({"distributed_type": "DEEPSPEED", "deepspeed_config": settings}, processes)
    if told.get("accelerate_use_fsdp", "").lower() == "true":
        return sharding_of_file({"distributed_type": "FSDP", "fsdp_config": told}, processes)
    return "ddp" if processes > 1 else "none"


def sharding_of_file(file: Mapping[str, Any], processes: int) -> str:
    """How an accelerate file's settings divide a model.

    Args:
        file: the YAML file's content.
        processes: how many train together.

    Returns:
        One of `memory.SHARDINGS`, or in words what is none of them.

    Raises:
        UserError: DeepSpeed's own settings, which the file names, cannot be read.
    """
    kind = str(file.get("distributed_type") or "NO").upper()
    if kind == "DEEPSPEED":
        return _zero(*deepspeed_settings(file))
    if kind == "FSDP":
        return _fsdp(_section(file, "fsdp_config"))
    if kind in ("MEGATRON_LM", "TPU", "XLA"):
        return kind
    return "ddp" if processes > 1 else "none"


def deepspeed_settings(file: Mapping[str, Any]) -> tuple[int, str, str]:
    """ZeRO's stage, and the devices that optimizer and parameters are offloaded to ("none", "cpu" or "nvme").

    Args:
        file: an accelerate file's content; its `deepspeed_config_file`, if it has one, says all of this.

    Raises:
        UserError: that file cannot be read, or a setting is none of DeepSpeed's.
    """
    settings = _section(file, "deepspeed_config")
    if path := settings.get("deepspeed_config_file"):
        where, content = str(path), _json(Path(str(path)))
        if "zero_optimization" not in content:
            raise UserError(f"{where}: has no `zero_optimization`, which accelerate needs")
        zero = _section(content, "zero_optimization", where)
        found = [
            zero.get("stage", 0),
            _section(zero, "offload_optimizer", where).get("device"),
            _section(zero, "offload_param", where).get("device"),
        ]
    else:
        where = "deepspeed_config"
        keys = ("zero_stage", "offload_optimizer_device", "offload_param_device")
        found = [settings.get(key) for key in keys]
    stage = "2" if found[0] in (None, "auto") else str(found[0])  # accelerate's own choice
    devices = ["none" if value in (None, False, "auto", "") else str(value).lower() for value in found[1:]]
    if stage not in ("0", "1", "2", "3"):
        raise UserError(f"{where}: the stage of ZeRO is 0, 1, 2 or 3, not {found[0]!r}")
    for value in devices:
        if value not in ("none", "cpu", "nvme"):
            raise UserError(f"{where}: the device to offload to is none, cpu or nvme, not {value!r}")
    return int(stage), devices[0], devices[1]


def _zero(stage: int, optimizer: str, parameters: str) -> str:
    if stage < 3:
        parameters = "none"  # which DeepSpeed offloads at stage 3 alone
    if stage == 0:
        return "ddp"
    if "nvme" in (optimizer, parameters):
        return f"zero{stage} with offloading to nvme"
    if parameters != "none":
        return "zero3_offload" if optimizer != "none" else "zero3_offload_parameters"
    if optimizer != "none":
        return "zero3_offload_optimizer" if stage == 3 else f"zero{stage}_offload"
    return f"zero{stage}"


def _fsdp(settings: Mapping[str, Any]) -> str:
    strategy = str(settings.get("fsdp_sharding_strategy", "FULL_SHARD")).upper()
    again = str(settings.get("fsdp_reshard_after_forward", "true")).upper()
    old = str(settings.get("fsdp_version", "1")) == "1"
    if old and strategy not in ("FULL_SHARD", "1"):
        return f"FSDP with {strategy}"
    if again not in ("TRUE", "FULL_SHARD", "1"):
        return "FSDP that keeps gathered weights (fsdp_reshard_after_forward)"
    return "fsdp2_offload" if str(settings.get("fsdp_offload_params", "false")).lower() == "true" else "fsdp2"


def _section(values: Mapping[str, Any], key: str, where: str = "the accelerate file") -> Mapping[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: `{key}` is a mapping of settings, not {found!r}")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"deepspeed_config_file {path}: no such file (a relative path starts in the current folder)")
    return read_json_object(path)
