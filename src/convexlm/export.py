"""`convexlm export`: a training checkpoint -> a plain folder that any program of the ecosystem loads.

Sharded weights become one set of safetensors, an adapter can be merged into its base, and the tokenizer, the prompt
settings (`convexlm.json`) and a model card go with them. What only training needs (optimizer, schedule, pickled
arguments) stays behind. Pickles are not loaded unseen: see `sharded` for FSDP2, `launch.deepspeed` for DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.adapters import merge_adapter as merged_model
from convexlm.checkpoints import COMPLETE_FILE, read_marker, why_incomplete
from convexlm.errors import UserError
from convexlm.files import write_atomic
from convexlm.launch.deepspeed import refuse_code, zero_folder
from convexlm.sharded import METADATA, SHARDED_FOLDER, load_sharded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja"),
)
STAGING = ".export"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    merge_adapter: bool = False,
    base_model: str | None = None,
    dtype: str = "auto",
    run_dir: str | Path | None = None,
    allow_pickle: bool = False,
    license_name: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as a plain folder.

    Args:
        checkpoint: a `checkpoint-STEP` of training, or any folder that `from_pretrained` or PEFT loads.
        output_dir: where to; must be empty or not be there.
        merge_adapter: put an adapter's weights into those of its base model.
        base_model: the base of an adapter, or where a sharded checkpoint's config comes from, if it does not say.
        dtype: of the written weights; "auto" keeps what they have.
        run_dir: the run folder that the card takes settings and scores from; found by the checkpoint's path if None.
        allow_pickle: let DeepSpeed unpickle a ZeRO checkpoint, whatever is in it. Only for one that you made yourself.
        license_name: the card's licence, as the hub names it.
        trust_remote_code: run code that comes with the model.

    Returns:
        `output_dir`, `kind` (plain, adapter, merged, sharded or zero), `parameters`, `dtype`, `files`, `card` (its
        path), `scores` (how many the card shows).

    Raises:
        UserError: the checkpoint is incomplete or cannot be exported as asked, or `output_dir` is not empty or cannot
            be written.
    """
    from convexlm.model_card import write_card

    source, target = Path(checkpoint), _real_path(output_dir)
    _check(source, target, output_dir, dtype)
    kind = kind_of(source)
    if merge_adapter and kind != "adapter":
        raise UserError(f"--merge_adapter: {source} holds no adapter ({ADAPTER_CONFIG} is missing)")
    if kind == "zero" and not allow_pickle:
        _refuse_code(source)
    # A folder that is there stays the same one: somebody's shell may be in it.
    staging = target / STAGING if target.is_dir() else target.parent / f".{target.name}{STAGING}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        if kind == "adapter" and not merge_adapter:
            count, written = _copy_adapter(source, staging, dtype, base_model)
        else:
            model = _load(source, kind, base_model, dtype, trust_remote_code)
            _end_as_trained(model, source, trust_remote_code)
            model.save_pretrained(staging)
            count, written = sum(p.numel() for p in model.parameters()), str(model.dtype).removeprefix("torch.")
            _without_paths(staging / "config.json")
        final = "merged" if kind == "adapter" and merge_adapter else kind
        _copy_tokenizer(source, staging, base_model)
        _copy_marker(source, staging)
        card = write_card(
            staging,
            checkpoint=source,
            run_dir=run_dir,
            kind=final,
            parameters=count,
            dtype=written,
            base_model=base_model,
            license_name=license_name,
            name=target.name,
        )
        _put_in_place(staging, target)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written ({_first_line(error)})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "output_dir": str(output_dir),
        "kind": final,
        "parameters": count,
        "dtype": written,
        "files": sorted(path.name for path in target.iterdir()),
        "card": str(Path(output_dir) / "README.md"),
        "scores": card["scores"],
    }


def kind_of(checkpoint: Path) -> str:
    """What a checkpoint folder holds: `adapter`, `plain`, `sharded` (FSDP2) or `zero` (DeepSpeed).

    Raises:
        UserError: nothing that can be exported.
    """
    if (checkpoint / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (checkpoint / "config.json").is_file() and any(checkpoint.glob("*.safetensors")):
        return "plain"
    if _sharded_folder(checkpoint) is not None:
        return "sharded"
    if (checkpoint / "latest").is_file() or any(checkpoint.glob("global_step*")):
        return "zero"
    if any(checkpoint.glob("*.bin")):
        raise UserError(
            f"{checkpoint}: its weights are pickles (.bin), which are not loaded; save them as safetensors"
        )
    raise UserError(f"{checkpoint}: no weights there (safetensors, an adapter, or FSDP2's or ZeRO's shards)")


def _sharded_folder(checkpoint: Path) -> Path | None:
    return next((p for p in (checkpoint / SHARDED_FOLDER, checkpoint) if (p / METADATA).is_file()), None)


def _real_path(output_dir: str | Path) -> Path:
    """Where the folder really is: what `.` and symbolic links stand for."""
    try:
        return Path(output_dir).resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise UserError(f"--output_dir {output_dir}: cannot be written ({_first_line(error)})") from None


def _put_in_place(staging: Path, target: Path) -> None:
    if staging.parent != target:
        staging.rename(target)
        return
    for path in sorted(staging.iterdir(), key=lambda path: path.name.endswith("config.json")):  # by which it loads
        path.rename(target / path.name)
    staging.rmdir()


def _check(source: Path, target: Path, output_dir: str | Path, dtype: str) -> None:
    if not source.is_dir():
        raise UserError(f"--checkpoint {source}: no such folder")
    marker = source / COMPLETE_FILE
    if marker.exists() and (reason := why_incomplete(source)):
        raise UserError(f"--checkpoint {source}: {reason}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    try:
        full = target.is_dir() and any(path.name != STAGING for path in target.iterdir())
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be read ({_first_line(error)})") from None
    if full or (target.exists() and not target.is_dir()):
        raise UserError(f"--output_dir {output_dir}: is not empty; give a folder that does not exist yet")
    if source.resolve() == target:
        raise UserError("--output_dir is the checkpoint itself")


def _refuse_code(source: Path) -> None:
    """See that ZeRO's shards, which are pickles, hold nothing but what DeepSpeed puts there."""
    folder = zero_folder(source)
    if folder is None:
        raise UserError(f"{source}: there are no states of DeepSpeed (global_stepN)")
    try:
        refuse_code(folder)
    except UserError as error:
        raise UserError(f"{error}; if you made the checkpoint yourself, give --allow_pickle") from None


# -- weights


def _load(source: Path, kind: str, base_model: str | None, dtype: str, trust_remote_code: bool) -> Any:
    if kind == "adapter":
        return _merged(source, base_model, dtype, trust_remote_code)
    if kind == "plain":
        return _pretrained(str(source), dtype, trust_remote_code)
    return _from_state(source, _state(source, kind), base_model, dtype, trust_remote_code)


def _pretrained(name: str, dtype: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **({"revision": revision} if revision else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{name}: the model cannot be loaded ({_first_line(error)})") from None


def _state(source: Path, kind: str) -> dict[str, Tensor]:
    if kind == "sharded":
        folder = _sharded_folder(source)
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
        raise UserError(f"{origin}: its config cannot be read ({_first_line(error)})") from None
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    wanted = getattr(torch, dtype, None) or (kinds.pop() if len(kinds) == 1 else torch.float32)
    state = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{source}: the shards do not fit {origin} ({_first_line(error)})") from None
    # Of tied weights one name is enough, whichever was saved.
    lacking = [name for name in missing if not _twin_is_there(model, name, state)]
    if lacking or unexpected:
        what = f"`{lacking[0]}` is missing" if lacking else f"`{unexpected[0]}` is unknown"
        raise UserError(f"{source}: the shards do not fit {origin}: {what}")
    return model


def _twin_is_there(model: Any, name: str, state: Mapping[str, Tensor]) -> bool:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name)
    return any(other is own and twin in state for twin, other in parameters.items() if own is not None)


def _merged(source: Path, base_model: str | None, dtype: str, trust_remote_code: bool) -> Any:
    from peft import PeftModel

    named, revision = base_of(source)
    base = base_model or named
    if not base:
        raise UserError(f"{source / ADAPTER_CONFIG}: does not say which model it belongs to; give --base_model")
    if not any(source.glob("adapter_model*.safetensors")):
        raise UserError(f"{source}: no adapter in safetensors format there")
    model = _pretrained(base, dtype, trust_remote_code, revision=None if base_model else revision)
    try:
        return merged_model(PeftModel.from_pretrained(model, str(source), use_safetensors=True))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{source}: the adapter does not fit {base} ({_first_line(error)})") from None


def base_of(adapter: Path) -> tuple[str | None, str | None]:
    """The base model that an adapter's config names, and which revision of it on the hub."""
    config = _json(adapter / ADAPTER_CONFIG)
    name, revision = (config.get(key) or None for key in ("base_model_name_or_path", "revision"))
    return name if isinstance(name, str) else None, revision if isinstance(revision, str) else None


def _copy_adapter(source: Path, target: Path, dtype: str, base_model: str | None) -> tuple[int, str]:
    """The adapter as PEFT loads it."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = source / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{source}: no adapter in safetensors format there")
    state = load_file(weights)
    if dtype != "auto":
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    save_file(state, target / weights.name, metadata={"format": "pt"})
    config = _json(source / ADAPTER_CONFIG)
    if base_model:
        config.update(base_model_name_or_path=base_model, revision=None)
    write_atomic(target / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    return sum(tensor.numel() for tensor in state.values()), "/".join(kinds)


# -- what goes with them


def _copy_tokenizer(source: Path, target: Path, base_model: str | None) -> None:
    """The tokenizer's files as they are; from the base model where the checkpoint has none."""
    folders = [source, *([Path(base_model)] if base_model and Path(base_model).is_dir() else [])]
    for folder in folders:
        found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in found):
            for path in found:
                shutil.copyfile(path, target / path.name)
            return


def _end_as_trained(model: Any, source: Path, trust_remote_code: bool) -> None:
    """Let generation end where the answers of the training did: an adapter's base may not."""
    from convexlm.chat_templates import also_ends
    from convexlm.tokenization import PromptSettings, answer_end, load_tokenizer

    if not read_marker(source).get("prompt") or not any(source.glob("tokenizer*")):
        return
    settings = PromptSettings.load(source)
    if settings.template == "chat":
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        also_ends(model.generation_config, answer_end(tokenizer, settings))


def _copy_marker(source: Path, target: Path) -> None:
    """`convexlm.json`: how prompts look and what was minimised, without the list of the checkpoint's own files."""
    marker = read_marker(source)
    kept = {key: marker[key] for key in ("prompt", "objective") if key in marker}
    if kept:
        write_atomic(target / COMPLETE_FILE, json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _without_paths(config: Path) -> None:
    content = _json(config)
    if Path(str(content.get("_name_or_path", ""))).is_absolute():
        del content["_name_or_path"]
        write_atomic(config, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
