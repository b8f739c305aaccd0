"""What a user says about a launch: on how many processes and machines, and sharded how."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.options import did_you_mean, load_yaml

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

PACKAGED = ("single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3", "zero3_offload")
DEFAULT_PORT = 29500  # accelerate's and torchrun's
# What an accelerate file may say, too; the command line and the recipe win over it.
IN_FILE = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # by torchrun and kinds of MPI
OF_TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class LaunchSettings:
    """A launch as the command line or a recipe says it; None is "not said".

    Attributes:
        accelerate_config: one of `PACKAGED`, or the path of an accelerate YAML file.
        num_processes: of all machines together.
        num_machines: machines that train together.
        machine_rank: which of them this is, from 0.
        main_process_ip: address of machine 0.
        main_process_port: port on it.
    """

    accelerate_config: str | None = None
    num_processes: int | None = None
    num_machines: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    def over(self, other: LaunchSettings) -> LaunchSettings:
        """These settings, and where they say nothing, another's."""
        return replace(other, **{name: value for name, value in asdict(self).items() if value is not None})

    def resolved(self, *, to_plan: bool = False) -> LaunchSettings:
        """With what the accelerate file says, checked.

        Args:
            to_plan: which machine this is, and where machine 0 is, may be left out.

        Raises:
            UserError: no such file, or numbers that do not fit together.
        """
        found = self.over(self._of_file()) if self.accelerate_config else self
        return _checked(found, to_plan)

    def _of_file(self) -> LaunchSettings:
        says = load_yaml(config_file(str(self.accelerate_config)))
        values = {key: says[key] for key in IN_FILE if says.get(key) is not None}
        for key, value in values.items():
            if key != "main_process_ip" and (not isinstance(value, int) or isinstance(value, bool)):
                raise UserError(f"{self.accelerate_config}: `{key}` must be a whole number, not {value!r}")
        if not isinstance(values.get("main_process_ip", ""), str):
            raise UserError(f"{self.accelerate_config}: `main_process_ip` must be an address")
        if values.get("num_machines", 1) == 1:
            values.pop("machine_rank", None)
        return LaunchSettings(**values)

    @property
    def machines(self) -> int:
        """How many machines train together."""
        return self.num_machines or 1

    @property
    def processes(self) -> int:
        """How many processes train together, on all machines; one a device where nothing is said."""
        return self.num_processes or self.machines * (self._single() or max(1, _devices()))

    @property
    def local_processes(self) -> int:
        """How many of them are on this machine."""
        return self.processes // self.machines

    def _single(self) -> int | None:
        single = self.accelerate_config and not self.num_processes and kind_of(self.accelerate_config) == "NO"
        return 1 if single else None


def config_file(name: str) -> Path:
    """The path of an accelerate file: a packaged one by its name, or one's own.

    Raises:
        UserError: neither.
    """
    if name in PACKAGED:
        return Path(str(resources.files("convexlm.launch") / "accelerate_configs" / f"{name}.yaml"))
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--accelerate_config {name}: no such file, and not one of {', '.join(PACKAGED)}{_meant(name)}"
        )
    return path


def kind_of(name: str) -> str:
    """The `distributed_type` of an accelerate file: NO, MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED, ..."""
    value = load_yaml(config_file(name)).get("distributed_type", "NO")
    return "NO" if value is False else str(value).upper()  # YAML reads a bare `NO` as false


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """The options of `LaunchSettings`, named as with the `trl` command and `accelerate launch`."""
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--accelerate_config",
        metavar="NAME_OR_FILE",
        help=f"{', '.join(PACKAGED)}, or an accelerate YAML file of your own",
    )
    group.add_argument(
        "--num_processes", type=int, metavar="N", help="processes of all machines together (default: one a GPU)"
    )
    group.add_argument("--num_machines", type=int, metavar="M", help="machines that train together")
    group.add_argument("--machine_rank", type=int, metavar="R", help="which of them this is, from 0")
    group.add_argument("--main_process_ip", metavar="ADDRESS", help="address of machine 0")
    group.add_argument("--main_process_port", type=int, metavar="PORT", help=f"port on it (default {DEFAULT_PORT})")


def launch_settings(values: Mapping[str, Any]) -> LaunchSettings:
    """The launch settings among a verb's options."""
    return LaunchSettings(**{field.name: values.get(field.name) for field in fields(LaunchSettings)})


def started_processes() -> int:
    """How many processes a launcher has started, by `WORLD_SIZE`; 1 where none has, or where it is set to nothing.

    Raises:
        UserError: it is no number, or 0.
    """
    for name in OF_TORCH:
        if os.environ.get(name) == "":
            del os.environ[name]  # transformers and accelerate would take the empty text for a number
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise UserError(
            f"WORLD_SIZE is a launcher's number of processes, at least 1, not {value!r}; unset it to train in one"
        )
    return int(value)


def under_a_launcher() -> bool:
    """Whether this process is one of several that `convexlm`, `torchrun` or `accelerate` started."""
    return started_processes() > 1


def refuse_another_launch(asked: LaunchSettings) -> None:
    """Under a launcher, see that the options say no more than what the launcher did.

    Raises:
        UserError: they say something else.
    """
    world = started_processes()
    if asked.num_processes is not None and asked.num_processes != world:
        raise UserError(
            f"--num_processes {asked.num_processes}: a launcher has started {world} processes already; leave the "
            "option out, or start `convexlm` without the launcher"
        )
    if asked.accelerate_config is not None:
        raise UserError(
            "--accelerate_config: a launcher has started this process already; give the file to "
            "`accelerate launch --config_file`, or start `convexlm` without the launcher"
        )


def refuse_half_a_launch() -> None:
    """See that `accelerate launch --cpu --num_processes N` has not started one process and left it at that.

    Raises:
        UserError: it has: it told where processes meet, but not which this one is.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if on_cpu and os.environ.get("MASTER_ADDR") and not any(os.environ.get(name) for name in SIZES):
        raise UserError(
            "`accelerate launch` was asked for several processes on the CPU and has started one; give --num_processes "
            "to `convexlm train` itself, without a launcher"
        )


def _checked(found: LaunchSettings, to_plan: bool) -> LaunchSettings:
    for name, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0), ("main_process_port", 1)):
        value = getattr(found, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f"--{name} must be a whole number of at least {least}, not {value!r}")
    machines = found.machines
    if found.num_processes is not None and found.num_processes % machines:
        raise UserError(f"--num_processes {found.num_processes} is no multiple of --num_machines {machines}")
    if machines > 1:
        if not to_plan and (found.machine_rank is None or found.main_process_ip is None):
            raise UserError("--num_machines needs --machine_rank (from 0) and --main_process_ip (of machine 0)")
        found = replace(found, main_process_port=found.main_process_port or DEFAULT_PORT)
    if (found.machine_rank or 0) >= machines:
        raise UserError(f"--machine_rank {found.machine_rank}: the {machines} machines are counted from 0")
    if (found.main_process_port or 0) > 65535:
        raise UserError(f"--main_process_port {found.main_process_port}: ports end at 65535")
    if found.accelerate_config and kind_of(found.accelerate_config) == "NO" and found.processes > 1:
        raise UserError(
            f"--accelerate_config {found.accelerate_config} is for one process, not {found.processes}; take "
            "multi_gpu, fsdp2, zero2 or zero3"
        )
    return found


def _meant(name: str) -> str:
    hint = did_you_mean(name, set(PACKAGED))
    return hint if "did you mean" in hint else ""


def _devices() -> int:
    import torch

    return torch.cuda.device_count()
