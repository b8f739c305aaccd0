"""The weights of an export: a model of what a checkpoint folder holds, each number of it from the files there."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from convexlm.adapters import merge_adapter
from convexlm.errors import UserError, first_line
from convexlm.files import read_json_object, write_atomic
from convexlm.sharded import METADATA, SHARDED_FOLDER, load_sharded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them


def sharded_folder(checkpoint: Path) -> Path | None:
    """Where FSDP2's shards of a checkpoint lie; None if it has none."""
    return next((p for p in (checkpoint / SHARDED_FOLDER, checkpoint) if (p / METADATA).is_file()), None)


def base_of(adapter: Path) -> tuple[str | None, str | None]:
    """The base model that an adapter's config names, and which revision of it on the hub."""
    config = read_json_object(adapter / ADAPTER_CONFIG)
    name, revision = (config.get(key) or None for key in ("base_model_name_or_path", "revision"))
    return name if isinstance(name, str) else None, revision if isinstance(revision, str) else None


def load(source: Path, kind: str, base_model: str | None, dtype: str, trust_remote_code: bool) -> Any:
    """The model of a checkpoint; an adapter is merged into its base.

    Args:
        source: the checkpoint.
        kind: what `export.kind_of` says of it.
        base_model: as `export_checkpoint` is given it.
        dtype: of the weights; "auto" keeps what they have.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: it cannot be loaded, its files do not have all of its weights, or there are numbers among them that
            are not finite.
    """
    if kind == "adapter":
        model = _merged(source, base_model, dtype, trust_remote_code)
    elif kind == "plain":
        model = _pretrained(str(source), dtype, trust_remote_code)
    else:
        model = _from_state(source, _state(source, kind), base_model, dtype, trust_remote_code)
    refuse_nonfinite(source, model.named_parameters(), dtype)
    return model


def refuse_nonfinite(source: Path, tensors: Iterable[tuple[str, Tensor]], dtype: str) -> None:
    """See that every weight is a number: a training may have diverged, and float16 ends at 65504.

    Raises:
        UserError: one is infinite or NaN.
    """
    import torch

    bad = next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        hint = "" if dtype == "auto" else f", as {dtype}"
        raise UserError(f"{source}: `{bad}` holds numbers that are not finite{hint}")


def _pretrained(name: str, dtype: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    from convexlm.decoding.checkpoint import check_checkpoint, is_adapter
    from convexlm.decoding.loading import whole_model

    if Path(name).is_dir():
        if is_adapter(Path(name)):
            raise UserError(f"{name}: an adapter, too; merge that one first")
        _stay_inside(Path(name))
        check_checkpoint(Path(name))
        dtype = _dtype_of(Path(name)) if dtype == "auto" else dtype
    at = {"revision": revision} if revision else {}
    return whole_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **at)


def _stay_inside(folder: Path) -> None:
    """See that the index of the weights names files of this folder only."""
    if not (folder / INDEX).is_file():
        return
    files = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{folder / INDEX}: does not say which weights are where (`weight_map`)")
    for name in files.values():
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{folder / INDEX}: names a file outside its folder ({name})")


def _dtype_of(folder: Path) -> str:
    """What the weights of a folder are, which its config need not say; where they differ, what holds them all."""
    from safetensors import safe_open

    from convexlm.decoding.loading import or_refuse

    kinds: set[str] = set()
    for path in sorted(folder.glob("model*.safetensors")):

        def read(path: Path = path) -> set[str]:
            with safe_open(path, "pt") as file:
                return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

        kinds |= or_refuse(f"{path}: cannot be read", read)
    if "quantization_config" in read_json_object(folder / "config.json"):
        return "auto"
    found = sorted(kind for kind in kinds if kind.startswith(("F", "BF")))
    if not found or any(kind not in _DTYPES for kind in found):
        return "auto"
    return _DTYPES[found[0]] if len(found) == 1 else "float32"


def _state(source: Path, kind: str) -> dict[str, Tensor]:
    if kind == "sharded":
        folder = sharded_folder(source)
        assert folder is not None
        return load_sharded(folder)
    try:
        from deepspeed.utils.zero_to_fp32 import (  # type: ignore[import-not-found,unused-ignore]
            get_fp32_state_dict_from_zero_checkpoint,
        )
    except ImportError:
        raise UserError(
            f"{source}: merging ZeRO's shards needs DeepSpeed, which is not installed (pip install deepspeed)"
        ) from None
    return dict(get_fp32_state_dict_from_zero_checkpoint(str(source)))


def _from_state(
    source: Path, state: dict[str, Tensor], base_model: str | None, dtype: str, trust_remote_code: bool
) -> Any:
    """A model of the checkpoint's config with these weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if any(".lora_" in name for name in state):
        raise UserError(f"{source}: a sharded adapter; save adapters whole (fsdp_state_dict_type: FULL_STATE_DICT)")
    origin = str(source) if (source / "config.json").is_file() else base_model
    if origin is None:
        raise UserError(f"{source}: there is no config.json beside the shards; name the model with --base_model")
    try:
        config = AutoConfig.from_pretrained(origin, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{origin}: its config cannot be read ({first_line(error)})") from None
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    wanted = getattr(torch, dtype, None) or (kinds.pop() if len(kinds) == 1 else torch.float32)
    state = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{source}: the shards do not fit {origin} ({first_line(error)})") from None
    # Of tied weights one name is enough, whichever was saved.
    lacking = [name for name in missing if not _twin_is_there(model, name, state)]
    if lacking or unexpected:
        what = f"`{lacking[0]}` is missing" if lacking else f"`{unexpected[0]}` is unknown"
        raise UserError(f"{source}: the shards do not fit {origin}: {what}")
    _generate_as(model, origin)
    return model


def _generate_as(model: Any, origin: str) -> None:
    """Give a model that was made of a config the generation settings beside it, as `from_pretrained` does."""
    from transformers import GenerationConfig

    from convexlm.decoding.loading import load_generation_config

    if Path(origin).is_dir():
        if (Path(origin) / "generation_config.json").is_file():
            model.generation_config = load_generation_config(Path(origin))
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(origin)
    except OSError:  # on the hub many models have none
        return


def _twin_is_there(model: Any, name: str, state: Mapping[str, Tensor]) -> bool:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name)
    return any(other is own and twin in state for twin, other in parameters.items() if own is not None)


def _merged(source: Path, base_model: str | None, dtype: str, trust_remote_code: bool) -> Any:
    from convexlm.decoding.loading import or_refuse, with_adapter

    named, revision = base_of(source)
    base = base_model or named
    if not base:
        raise UserError(f"{source / ADAPTER_CONFIG}: does not say which model it belongs to; give --base_model")
    if not (source / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{source}: no adapter in safetensors format there")
    model = _pretrained(base, dtype, trust_remote_code, revision=None if base_model else revision)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(
            f"{base}: its weights are quantized, so that the adapter's update would be rounded away in part; name the "
            "full-precision model with --base_model"
        )
    try:
        return or_refuse(f"the adapter does not fit {base}", lambda: merge_adapter(with_adapter(model, source, "cpu")))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def copy_adapter(source: Path, target: Path, dtype: str, base_model: str | None) -> tuple[int, str]:
    """Write an adapter as PEFT loads it.

    Returns:
        how many numbers it holds, and of which dtypes.

    Raises:
        UserError: there is none, it cannot be read, or there are numbers in it that are not finite.
    """
    import json

    import torch
    from safetensors.torch import load_file, save_file

    from convexlm.decoding.loading import or_refuse

    weights = source / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise UserError(f"{source}: no adapter in safetensors format there")
    state: dict[str, Tensor] = or_refuse(f"{weights}: cannot be read", lambda: load_file(weights))
    if dtype != "auto":
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    refuse_nonfinite(source, state.items(), dtype)
    save_file(state, target / weights.name, metadata={"format": "pt"})
    config = read_json_object(source / ADAPTER_CONFIG)
    if base_model:
        config.update(base_model_name_or_path=base_model, revision=None)
    write_atomic(target / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    return sum(tensor.numel() for tensor in state.values()), "/".join(kinds)
