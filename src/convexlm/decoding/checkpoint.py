"""A checkpoint folder: is it one, what is its hash, how were its prompts made. Reads files only, loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256, read_json_object

# Everything that can change what a checkpoint answers; optimizer states and logs are not among it.
_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*config.json"),
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "chat_template*", "*.py"),
)
_VIRTUAL_TOKENS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
_NAMES = ("convexlm.json", "special_tokens_map.json", "added_tokens.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_checkpoint(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or a hub name (`owner/model`) out of the hub's cache or fetched.

    Raises:
        UserError: neither a folder with a model in it nor a hub name that can be had.
    """
    path = Path(name_or_path)
    if not path.exists() and isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name_or_path):
        path = _from_hub(name_or_path, revision)
    check_checkpoint(path)
    return path


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_PATTERNS, *_NAMES]
    try:
        try:
            folder = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        except Exception:  # not in the cache: the hub's own errors are many, and all mean "fetch it"
            folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{name}: no such folder, and not to be had from the hub ({reason})") from None
    return Path(folder)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter rather than a whole model; its base model's config may lie beside it."""
    return (folder / "adapter_config.json").is_file() and not _has_whole_model(folder)


def _has_whole_model(folder: Path) -> bool:
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def refuse_several_adapters(folder: Path) -> None:
    """Refuse an adapter beside which PEFT saved others: which of them were at work is not in the files.

    Raises:
        UserError: there are some.
    """
    # The checkpoints of a training may lie beside its end.
    inside = {path.parent for path in folder.glob("*/adapter_config.json")} - set(folder.glob("checkpoint-*"))
    if others := sorted(inside):
        raise UserError(
            f"{folder}: holds several adapters (its own, {', '.join(path.name for path in others)}), and which of "
            "them were at work is not said; take the one that is meant out into a folder of its own"
        )


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that holds no model, before anything heavy starts.

    Raises:
        UserError: no such folder, no config, weights missing (or there only as pickles, which are not loaded), a whole
            model and an adapter in one folder, or an adapter that works by virtual tokens or from some tokens on.
    """
    if not folder.exists():
        raise UserError(f"{folder}: no such checkpoint folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a checkpoint folder")
    if is_adapter(folder):
        refuse_several_adapters(folder)
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{folder}: an adapter without weights (no adapter_model.safetensors)")
        config = read_json_object(folder / "adapter_config.json")
        kind = str(config.get("peft_type")).upper()
        if _has_virtual_tokens(kind):
            raise UserError(
                f"{folder}: adapters of the kind {kind} (virtual tokens) cannot be used here, where the base model's "
                "weights alone would answer"
            )
        if config.get("alora_invocation_tokens"):
            raise UserError(
                f"{folder}: an activated LoRA (alora_invocation_tokens), which works in PEFT's own model only and "
                "cannot be merged, so that the base model alone would answer here; run it with PEFT, or train a plain "
                "LoRA"
            )
        return
    if (folder / "adapter_config.json").is_file() and _has_whole_model(folder):
        # transformers puts the one on the other, so an adapter that was merged into its own folder would count twice.
        raise UserError(f"{folder}: holds a whole model and an adapter; take out the one that is not meant")
    if not (folder / "config.json").is_file():
        inner = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        inner = inner or sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"; did you mean {folder / inner[-1]}?" if inner else ""
        raise UserError(f"{folder}: not a checkpoint folder (it has no config.json){hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json_object(index).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing or not shards:
            raise UserError(f"{folder}: weights missing ({', '.join(missing[:3]) or 'an empty index'})")
    elif not (folder / "model.safetensors").is_file():
        pickles = any(folder.glob("pytorch_model*.bin"))
        hint = "; its .bin files are pickles: save it again as safetensors, with save_pretrained" if pickles else ""
        raise UserError(f"{folder}: weights missing (no model.safetensors){hint}")


def _has_virtual_tokens(kind: str) -> bool:
    """Whether an adapter's kind puts virtual tokens before the text: PEFT is asked about kinds that are not listed."""
    if kind in _VIRTUAL_TOKENS or kind == "LORA":  # PEFT takes seconds to import, and nearly all adapters are LoRA
        return kind in _VIRTUAL_TOKENS
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig
    except ImportError:
        return False
    config = {str(name.value).upper(): found for name, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind, object)
    return issubclass(config, PromptLearningConfig) or getattr(config, "is_prompt_learning", None) is True


def base_of_adapter(folder: Path) -> Path:
    """The folder of the base model that an adapter was trained on, in the revision that it names.

    Raises:
        UserError: the adapter does not name one, or it cannot be found.
    """
    config = read_json_object(folder / "adapter_config.json")
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise UserError(f"{folder}: adapter_config.json does not name its base model (base_model_name_or_path)")
    try:
        base = find_checkpoint(name, revision=revision or None)
    except UserError as error:
        hint = ""
        if not Path(name).exists():
            hint = "; change base_model_name_or_path in its adapter_config.json"
            if not Path(name).is_absolute():
                hint = "; a relative path counts from the current folder: go where it was trained, or" + hint[1:]
        raise UserError(f"{folder}: the base model of this adapter cannot be used: {error}{hint}") from None
    if is_adapter(base):
        raise UserError(
            f"{folder}: the base model of this adapter is an adapter, too ({base}): merge that one with `convexlm "
            "export --merge_adapter`, and name the merged folder as base_model_name_or_path in adapter_config.json"
        )
    return base


def checkpoint_sha256(folder: Path) -> str:
    """One hash over weights, configs, tokenizer and prompt settings: two equal ones answer alike.

    The folder's name is not in it. An adapter's includes its base model's.
    """
    files = {path.name for pattern in (*_PATTERNS, *_NAMES) for path in folder.glob(pattern) if path.is_file()}
    hashes = {name: file_sha256(folder / name) for name in sorted(files)}
    if is_adapter(folder):
        hashes["base model"] = checkpoint_sha256(base_of_adapter(folder))
    return json_sha256(hashes)


def has_prompt_settings(folder: Path) -> bool:
    """Whether the checkpoint says how the prompts it was trained on were made."""
    settings = folder / "convexlm.json"
    return settings.is_file() and "prompt" in read_json_object(settings)


def choose_device(device: str | None) -> str:
    """The device asked for, or the first GPU if there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if device == "cpu":
        return device
    import torch

    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    assert device is not None
    if device.partition(":")[0] == "meta":  # torch knows it, and it computes nothing
        raise UserError("device `meta` cannot be used here (it computes nothing)")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"device `{device}` cannot be used here ({reason})") from None
    return device


def choose_dtype(folder: Path, device: str, dtype: str | None) -> str:
    """The dtype asked for; else float32 on the CPU, and as the checkpoint was saved elsewhere.

    Raises:
        UserError: not one of float32, bfloat16, float16.
    """
    known = ("float32", "bfloat16", "float16")
    if dtype not in (None, "auto"):
        if dtype not in known:
            raise UserError(f"unknown dtype `{dtype}`; known: auto, {', '.join(known)}")
        return str(dtype)
    if device == "cpu":
        return "float32"
    config = read_json_object((base_of_adapter(folder) if is_adapter(folder) else folder) / "config.json")
    saved = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return saved if saved in known else "float32"
