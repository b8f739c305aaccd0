"""What is special about DeepSpeed: running it on the CPU, and reading what it saved without running it."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.launch.environment import DEEPSPEED_ON_CPU

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What DeepSpeed's checkpoints hold beside tensors and plain values.
_OWN_CLASSES = re.compile(
    r"deepspeed\.(runtime\.fp16\.loss_scaler\.\w*LossScaler|runtime\.zero\.config\.ZeroStageEnum|"
    r"utils\.tensor_fragment\.fragment_address)"
)


def is_on_cpu() -> bool:
    """Whether this process was started to train under DeepSpeed on the CPU."""
    return os.environ.get(DEEPSPEED_ON_CPU) == "1"


def options_on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    """A training's options for DeepSpeed on the CPU; to be called before anything starts the process group.

    Its shared-memory collectives are turned off: they would be compiled first, for a minute or more and by a compiler
    that may not be there, and gloo does the same.
    """
    import deepspeed  # type: ignore[import-not-found,unused-ignore]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {**values, "use_cpu": False, "ddp_backend": "gloo"}


@contextlib.contextmanager
def unsharded(config: Any) -> Iterator[None]:
    """While entered, transformers makes models whole also under ZeRO-3; DeepSpeed then shards what it is given.

    Else a new model's random weights would be others than on one process, for they are drawn in another order.

    Args:
        config: the training options.
    """
    from transformers.integrations.deepspeed import (
        is_deepspeed_zero3_enabled,
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    if not is_deepspeed_zero3_enabled():
        yield
        return
    kept = getattr(config, "hf_deepspeed_config", None) or config.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(kept)


def zero_folder(checkpoint: Path) -> Path | None:
    """Where a checkpoint has DeepSpeed's states (`global_stepN`, as its file `latest` says); None if it has none.

    Raises:
        UserError: `latest` names something else.
    """
    if not (checkpoint / "latest").is_file():
        return next(iter(sorted(checkpoint.glob("global_step*"))), None)
    name = (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\w[\w.-]*", name) or not (checkpoint / name).is_dir():
        raise UserError(f"{checkpoint / 'latest'}: names no folder of DeepSpeed's states there ({name!r})")
    return checkpoint / name


def zero_stage_of(folder: Path) -> int:
    """The stage that saved such a folder: 3 keeps each process's part of the weights, lower ones do not."""
    return 3 if any(folder.glob("zero_pp_rank_*_model_states.pt")) else 2


def processes_of(folder: Path) -> int:
    """How many processes have saved such a folder."""
    return sum(1 for _ in folder.glob("*_optim_states.pt"))


def refuse_code(folder: Path) -> None:
    """See that DeepSpeed's states, which it unpickles, hold tensors, plain values and its own few classes only.

    Nothing is unpickled here: torch takes the pickle's instructions apart and lists the names that it would load.

    Raises:
        UserError: they name anything else, or are not files of `torch.save`.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            names = get_unsafe_globals_in_checkpoint(str(path))
        except Exception as error:  # damaged or forged, it can raise anything
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"{path}: not a file of DeepSpeed's states ({reason})") from None
        foreign = sorted(name for name in names if not _OWN_CLASSES.fullmatch(name))
        if foreign:
            raise UserError(f"{path}: its pickle names {foreign[0]}, which does not belong there and is not loaded")
