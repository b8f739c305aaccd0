"""Sharded checkpoints of FSDP2 (torch.distributed.checkpoint) -> one state dict, without running what is in them.

Such a folder holds `.distcp` files, whose tensors torch loads as plain data, and `.metadata`, which is a pickle: read
as torch and accelerate read it, a forged one runs any code. Here it is read by an unpickler that knows the few classes
that belong there and refuses every other name, and entries that are no tensors are refused, too.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"
SHARDED_FOLDER = "pytorch_model_fsdp_0"  # accelerate's name for the weights; `optimizer_0` is beside it

_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    (_CHECKPOINT + "metadata", "*"),
    (_CHECKPOINT + "filesystem", "_StorageInfo"),
    (_CHECKPOINT + "_fsspec_filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "list"),
    ("builtins", "dict"),
    ("builtins", "tuple"),
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and ((module, name) in _ALLOWED or (module, "*") in _ALLOWED):
            found = super().find_class(module, name)
            # What a module has imported (`os`, say) is not its own.
            if getattr(found, "__module__", module) == module or module == "torch":
                return found
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath", "PurePosixPath", "PurePath"):
            return PurePosixPath  # where it was saved: of no use here
        if module == "torch":
            import torch

            if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_metadata(file: IO[bytes], where: Path) -> Any:
    """The metadata of a sharded checkpoint.

    Raises:
        UserError: it is damaged, or holds what does not belong there.
    """
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    try:
        found = _Unpickler(file).load()
    except Exception as error:  # a damaged or forged pickle can raise anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{where}: not the metadata of a sharded checkpoint ({reason})") from None
    entries = getattr(found, "state_dict_metadata", None)
    if not isinstance(found, Metadata) or not isinstance(entries, dict) or not entries:
        raise UserError(f"{where}: not the metadata of a sharded checkpoint (there are no tensors in it)")
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{where}: `{name}` is no tensor but a pickled object, which is not loaded")
    for info in (getattr(found, "storage_data", None) or {}).values():
        relative = Path(str(getattr(info, "relative_path", "")))
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{where}: names a file outside its folder ({relative})")
    return found


def load_sharded(folder: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint, whole, on the CPU; accelerate's prefix `model.` is taken off.

    Raises:
        UserError: damaged, forged or incomplete.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = metadata_of(folder)
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    def metadata_of(where: Path) -> Any:
        with (where / METADATA).open("rb") as file:
            return read_metadata(file, where / METADATA)

    entries = metadata_of(folder).state_dict_metadata
    try:
        # A damaged size may be more than any memory holds.
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        dcp.load(state, storage_reader=Reader(str(folder)), no_dist=True)
    except UserError:
        raise
    except CheckpointException as error:  # no Exception, but a BaseException
        reason = next((str(failure[0]).split("\n")[0] for failure in error.failures.values()), "damaged")
        raise UserError(f"{folder}: the sharded checkpoint cannot be read ({reason})") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{folder}: the sharded checkpoint cannot be read ({reason})") from None
    # accelerate saves {"model": {...}}, which the format spells as a prefix of every name.
    if all(name.startswith("model.") for name in state) and any(
        name.startswith(("model.model.", "model.lm_head.", "model.base_model.", "model.transformer."))
        for name in state
    ):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return state
