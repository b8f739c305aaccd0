"""From settings to the variables with which every process of a launch is started.

What an accelerate file means is accelerate's to say: its own functions translate it. Starting the processes is done
here (`processes`), for `accelerate launch` starts one process where it was asked for several on a machine without GPU.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convexlm.errors import UserError
from convexlm.launch.settings import config_file, kind_of

if TYPE_CHECKING:
    from convexlm.launch.settings import LaunchSettings

# Set by whoever launches; what an earlier launch has left must not reach a new one.
OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
FSDP_ON_CPU = "CONVEXLM_FSDP_ON_CPU"
DEEPSPEED_ON_CPU = "CONVEXLM_DEEPSPEED_ON_CPU"
# Told to use the CPU, accelerate would leave DeepSpeed out and train with DDP. So it sees no GPU instead.
DEEPSPEED_ON_CPU_VARIABLES = {
    DEEPSPEED_ON_CPU: "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "false",
}


@dataclass(frozen=True)
class Plan:
    """A launch on this machine.

    Attributes:
        kind: the `distributed_type` of its accelerate file; MULTI_GPU without one.
        world: processes of all machines together.
        local: processes on this machine.
        first_rank: the rank of the first of them.
        alone: a single process that needs no process group.
        on_cpu: whether they train on the CPU.
        variables: the same for every process.
    """

    kind: str
    world: int
    local: int
    first_rank: int
    alone: bool
    on_cpu: bool
    variables: dict[str, str]

    def of_process(self, number: int, address: str, port: int) -> dict[str, str]:
        """The environment of the process with this number on this machine."""
        environment = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCH}
        environment.update(self.variables)
        if not self.alone:
            environment.update(
                RANK=str(self.first_rank + number),
                LOCAL_RANK=str(number),
                WORLD_SIZE=str(self.world),
                LOCAL_WORLD_SIZE=str(self.local),
                GROUP_RANK=str(self.first_rank // self.local),
                MASTER_ADDR=address,
                MASTER_PORT=str(port),
                # The store is kept by the launcher, which outlives its processes, as with torchrun.
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT="0",
            )
        return environment


def make_plan(settings: LaunchSettings, *, use_cpu: bool = False) -> Plan:
    """Check a launch against this machine, and translate it.

    Args:
        settings: resolved.
        use_cpu: train on the CPU although there may be GPUs.

    Raises:
        UserError: too few devices, a package that is missing, or a file that accelerate cannot use.
    """
    import torch

    name = settings.accelerate_config
    kind = kind_of(name) if name else "MULTI_GPU"
    devices = 0 if use_cpu or kind == "MULTI_CPU" or _file_says_cpu(name) else torch.cuda.device_count()
    local = settings.local_processes
    on_cpu = devices == 0 and not _other_accelerator(use_cpu)
    if 0 < devices < local:
        raise UserError(
            f"--num_processes {settings.processes}: that is {local} on this machine, which has {devices} GPU"
            f"{'s' * (devices > 1)}; give --num_processes {devices * settings.machines}, or --use_cpu true"
        )
    if kind == "DEEPSPEED":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(f"--accelerate_config {name} needs DeepSpeed; install it with `pip install deepspeed`")
        if on_cpu and _offloads(str(name)):
            raise UserError(f"--accelerate_config {name}: on the CPU there is nothing to offload from; take zero3")
    if kind == "FSDP" and on_cpu and settings.processes == 1:
        raise UserError(f"--accelerate_config {name}: on the CPU, FSDP needs --num_processes of at least 2")
    if kind == "FSDP" and on_cpu and (reason := _fsdp_not_on_cpu(str(name))):
        raise UserError(f"--accelerate_config {name}: on the CPU {reason}")
    variables = _accelerate_variables(settings, kind) if name else {}
    variables.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS") or str(_threads(local)))
    if on_cpu and kind == "DEEPSPEED":
        variables.update(DEEPSPEED_ON_CPU_VARIABLES)
    elif on_cpu:
        variables["ACCELERATE_USE_CPU"] = "true"
        if kind == "FSDP":
            variables[FSDP_ON_CPU] = "1"
    elif kind == "NO" and devices > 1 and not variables.get("CUDA_VISIBLE_DEVICES"):
        # transformers would split every batch over all devices that it sees (nn.DataParallel).
        variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return Plan(
        kind=kind,
        world=settings.processes,
        local=local,
        first_rank=(settings.machine_rank or 0) * local,
        alone=settings.processes == 1 and kind not in ("FSDP", "DEEPSPEED"),
        on_cpu=on_cpu,
        variables=variables,
    )


def _accelerate_variables(settings: LaunchSettings, kind: str) -> dict[str, str]:
    """What `accelerate launch` would set for the file: ACCELERATE_*, FSDP_*, and so on."""
    import warnings

    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch

    words = ["--config_file", str(config_file(str(settings.accelerate_config)))]
    words += ["--num_processes", str(settings.processes), "--num_machines", "1", "--machine_rank", "0"]
    # Ports and addresses are set for every process; this one is only not to be taken.
    words += ["--main_process_port", "0", "--module", "convexlm.launch.child"]
    prepare = {
        "NO": lambda args: launch.prepare_simple_launcher_cmd_env(args)[1],
        "MULTI_CPU": lambda args: launch.prepare_simple_launcher_cmd_env(args)[1],
        "DEEPSPEED": lambda args: launch.prepare_deepspeed_cmd_env(args)[1],
    }.get(kind, launch.prepare_multi_gpu_env)
    try:
        args, defaults, from_file = _validate_launch_command(launch_command_parser().parse_args(words))
        args.num_machines = 1
        if kind == "DEEPSPEED":
            named = list(defaults.deepspeed_config) + (["mixed_precision"] if from_file else [])
            args.deepspeed_fields_from_accelerate_config = ",".join(named)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            environment = prepare(args)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        text = str(error).strip().split("\n")[0]
        raise UserError(f"--accelerate_config {settings.accelerate_config}: {text or type(error).__name__}") from None
    before = os.environ
    return {
        key: value
        for key, value in environment.items()
        if before.get(key) != value and key not in OF_A_LAUNCH and key != "PYTHONPATH"
    }


def _file_says_cpu(name: str | None) -> bool:
    from convexlm.options import load_yaml

    return bool(name and load_yaml(config_file(name)).get("use_cpu"))


def _offloads(name: str) -> bool:
    from convexlm.launch.sharding import deepspeed_settings
    from convexlm.options import load_yaml

    return deepspeed_settings(load_yaml(config_file(name)))[1:] != ("none", "none")


def _fsdp_not_on_cpu(name: str) -> str | None:
    from convexlm.launch.sharding import sharding_of_file
    from convexlm.options import load_yaml

    file = load_yaml(config_file(name))
    if sharding_of_file(file, 2) == "fsdp2_offload":
        return "there is nothing to offload from; leave `fsdp_offload_params` out, or take fsdp2"
    if str((file.get("fsdp_config") or {}).get("fsdp_version", "1")) == "1":
        return "only the second FSDP trains; set `fsdp_version: 2`, or take fsdp2"
    return None


def _other_accelerator(use_cpu: bool) -> bool:
    """Whether there is an accelerator that is no CUDA device."""
    import torch

    current = None if use_cpu or not hasattr(torch, "accelerator") else torch.accelerator.current_accelerator(True)
    return current is not None and current.type not in ("cpu", "cuda")


def _threads(local: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local)
