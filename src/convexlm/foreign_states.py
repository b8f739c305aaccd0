"""Going on from a checkpoint that FSDP2 has written, in one process or under DDP too.

transformers reads such a checkpoint under FSDP only. All that is needed is there: the whole weights in safetensors,
and (`fsdp_state_dict_type: FULL_STATE_DICT`, as in the packaged `fsdp2`) the optimizer's whole state by the names of
parameters, which `torch.distributed.checkpoint.state_dict` puts into an optimizer of any kind. It fails where there is
no state at all (SGD without momentum; torch 2.13), under FSDP too; then the settings of the groups are all that is
taken up.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIMIZER_OF_FSDP = "optimizer.bin"
WEIGHTS_OF_FSDP = "pytorch_model_fsdp"  # with `.bin`, or a folder of shards


def is_whole_of_fsdp(checkpoint: str | Path) -> bool:
    """Whether FSDP has saved the optimizer's whole state there, and not every process its part."""
    return (Path(checkpoint) / OPTIMIZER_OF_FSDP).is_file()


class ForeignStates:
    """Mixed into a Trainer before its class."""

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in the Trainer, which would refuse the weights for what lies beside them."""
        if self.is_fsdp_enabled or not is_whole_of_fsdp(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        with _without_fsdp(Path(resume_from_checkpoint)) as folder:
            super()._load_from_checkpoint(str(folder), model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        """As in the Trainer; FSDP's whole state is read where there is no FSDP, and where it is empty."""
        if checkpoint is None or not is_whole_of_fsdp(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        folder = Path(checkpoint)
        # Under FSDP every process only looks whether there is a state; the first one loads it.
        mapped = self.is_fsdp_enabled
        state = torch.load(folder / OPTIMIZER_OF_FSDP, map_location="cpu", weights_only=True, mmap=mapped)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper is none of torch's
        if not state["state"]:
            _set_groups(optimizer, state["param_groups"])
        elif self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        else:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model_wrapped, optimizer, state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def _set_groups(optimizer: Any, saved: list[dict[str, Any]]) -> None:
    if len(saved) != len(optimizer.param_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for group, settings in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})


@contextlib.contextmanager
def _without_fsdp(checkpoint: Path) -> Iterator[Path]:
    """A folder with links to all that is in the checkpoint but FSDP's own weights."""
    with tempfile.TemporaryDirectory(prefix="convexlm-") as name:
        folder = Path(name)
        for path in checkpoint.iterdir():
            if not path.name.startswith(WEIGHTS_OF_FSDP):
                (folder / path.name).symlink_to(path.resolve())
        yield folder
