"""In a process of a launch: see that it has become what was asked for, before anything is trained."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.fsdp import asks_for_fsdp, optimizer_not_sharded, saves_whole_states
from convexlm.launch.deepspeed import is_on_cpu, processes_of, refuse_code, zero_folder, zero_stage_of
from convexlm.launch.environment import FSDP_ON_CPU
from convexlm.launch.settings import started_processes
from convexlm.progress import note

if TYPE_CHECKING:
    from pathlib import Path

FSDP_FILES = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")


def set_up(config: Any) -> None:
    """Check the processes of a training and how they share it.

    Args:
        config: the training options, which have set up the process group.

    Raises:
        RuntimeError: there are not as many processes as a launcher has said.
        UserError: FSDP was asked for where accelerate would quietly train without, or with an optimizer that does not
            go with it.
    """
    said, found = started_processes(), int(config.world_size)
    if said != found:
        raise RuntimeError(f"a launcher has said that {said} processes train together, but accelerate sees {found}")
    if is_on_cpu() and str(config.distributed_state.distributed_type) != "DistributedType.DEEPSPEED":
        raise RuntimeError("DeepSpeed was to train on the CPU, but accelerate has not taken it up")
    if config.n_gpu > 1:
        # transformers would split every batch over them in this one process (nn.DataParallel).
        note(f"  one of {config.n_gpu} GPUs is used; --num_processes {config.n_gpu} takes all")
        config._n_gpu = 1
    if reason := optimizer_not_sharded(config):
        raise UserError(reason)
    if asks_for_fsdp(config) and config.device.type == "cpu":
        _allow_fsdp_on_cpu(found)


def refuse_another_engine(
    output_dir: str | Path, *, resume: bool, zero_stage: int | None = None, processes: int = 1, config: Any = None
) -> None:
    """See that a checkpoint to go on from was written by an engine that this one can read.

    Args:
        output_dir: where the checkpoints are.
        resume: whether one is to be gone on from.
        zero_stage: the stage of ZeRO to train under; None without DeepSpeed.
        processes: how many train together.
        config: the training options.

    Raises:
        UserError: it was not, where transformers would stop in the middle of loading; or it holds code.
    """
    from convexlm.checkpoints import complete_checkpoints
    from convexlm.foreign_states import is_whole_of_fsdp

    checkpoints = complete_checkpoints(output_dir) if resume else []
    if not checkpoints:
        return
    last = checkpoints[-1]
    folder = zero_folder(last)
    anew = _begin_anew(last)
    if folder is not None:
        stage, count = zero_stage_of(folder), processes_of(folder)
        same = zero_stage == stage if stage == 3 else zero_stage in (1, 2)
        if not same or count != processes:
            raise UserError(
                f"{last} was saved under ZeRO-{stage} by {count} process{'es' * (count != 1)}, and only as many under "
                f"the same can go on from it: give --accelerate_config zero{stage} --num_processes {count}; or {anew}"
            )
        refuse_code(folder)
        return
    by_fsdp, with_fsdp = any((last / name).exists() for name in FSDP_FILES), asks_for_fsdp(config)
    whole = is_whole_of_fsdp(last)
    if by_fsdp and not with_fsdp and (zero_stage is not None or not whole):
        raise UserError(
            f"{last} was saved under FSDP{'' if whole else ' as shards'}, which only FSDP can go on from: give "
            f"--accelerate_config {'fsdp2' if whole else 'with the file that it was saved with'}; or {anew}"
        )
    if by_fsdp and with_fsdp and whole != saves_whole_states(config):
        saved, other = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")[:: 1 if whole else -1]
        raise UserError(
            f"{last} was saved under FSDP with {saved}, and {other} cannot go on from it: give an accelerate file "
            f"with `fsdp_state_dict_type: {saved}`{', such as fsdp2' if whole else ''}; or {anew}"
        )
    if (last / "optimizer.pt").exists() and (with_fsdp or zero_stage is not None):
        name = "FSDP" if with_fsdp else "DeepSpeed"
        raise UserError(
            f"{last} was saved without {name}, and {name} cannot go on from it: leave --accelerate_config "
            f"{'fsdp2' if with_fsdp else 'zero2, zero3 and the like'} out; or {anew}"
        )


def _begin_anew(checkpoint: Path) -> str:
    if (checkpoint / "adapter_config.json").is_file():
        first = f"merge its adapter with `convexlm export --checkpoint {checkpoint} --output_dir DIR --merge_adapter`"
    elif not any(checkpoint.glob("*.safetensors")):
        model = "" if (checkpoint / "config.json").is_file() else " --base_model MODEL"
        first = f"make its shards one model with `convexlm export --checkpoint {checkpoint} --output_dir DIR{model}`"
    else:
        return f"begin a new training from its weights with --model_name_or_path {checkpoint}"
    return f"{first} and begin a new training from that, with --model_name_or_path DIR"


def _allow_fsdp_on_cpu(processes: int) -> None:
    """Let accelerate shard on the CPU, which torch can.

    accelerate (1.12 to 1.15) takes up FSDP only where the processes are of an accelerator's kind, such as MULTI_GPU;
    for MULTI_CPU it goes on with DDP and says nothing (`AcceleratorState.__init__`). Told that they are, it does all
    the rest right: torch's `fully_shard` takes the CPU where there is nothing else.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if os.environ.get(FSDP_ON_CPU) != "1" or processes < 2:
        raise UserError(
            "FSDP on the CPU: accelerate would train without it; start with "
            "`convexlm train --accelerate_config fsdp2 --num_processes N`"
        )
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
