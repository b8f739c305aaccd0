"""What a checkpoint keeps of the training that it belongs to, so that no other one goes on from it.

Its `convexlm.json` has `prompt` and `objective`, which decoding reads; `training`: what has to stay the same; and
`optimizer`: what may be changed on the way (see `convexlm.continuing`); `evaluation`: the data to evaluate on. A key
that is missing, as in checkpoints of earlier versions, is taken as not known.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.checkpoints import read_marker
from convexlm.errors import UserError
from convexlm.files import file_sha256, json_sha256
from convexlm.training_model import revision_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trl import ModelConfig

    from convexlm.config import ConvexConfig
    from convexlm.data_options import DataOptions

_OF_TRAINING = (
    *("k_warmup", "label_smoothing_factor", "max_length", "seed", "packing", "shuffle_dataset"),
    *("train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha", "router_aux_loss_coef"),
)
_OF_ADAPTERS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
)
_OF_QUANTIZATION = ("load_in_8bit", "load_in_4bit")
_OF_4_BITS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
_OF_OPTIMIZER = (
    *("optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim_target_modules"),
    *("bf16", "fp16"),
)
# Loading options that are known otherwise, or change nothing.
_SAME_MODEL = ("dtype", "attn_implementation", "device_map")
_BY_CONTENT = ("dataset", "model", "tokenizer", "config")
_WORDS = {
    "name": "the objective",
    "dataset": "the data",
    "model": "the model",
    "tokenizer": "the tokenizer",
    "config": "the model's config",
    "global_batch": "the global batch (rows x accumulation x processes)",
    "split": "the global batch, of which --dataloader_drop_last or batch_rebalance makes an order of its own,",
}
# Files above this size are known by parts of them, for a large model or stream should not wait for its hash.
_WHOLE = 1 << 30
_PARTS, _PART = 64, 1 << 20


def training_marker(
    prompt: Mapping[str, Any],
    objective: Mapping[str, Any],
    args: ConvexConfig,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What checkpoints keep of what they are trained on and for.

    Args:
        prompt: the settings of prompts.
        objective: as `Objective.to_dict` gives it.
        args: the training options.
        data: what identifies the records: `dataset` (its `name` and `content`, None if not known) and how it is read.
        model: as `model_identity` gives it.
        evaluation: `name` and `content` of the data to evaluate on.
    """
    options = {name: _plain(getattr(args, name)) for name in _OF_TRAINING}
    if args.packing:
        options["packing_strategy"] = args.packing_strategy
    options["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    options["global_batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last or args.train_sampling_strategy == "batch_rebalance":
        # Then the split says where an epoch ends, or who gets which record.
        parts = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
        options["split"] = " x ".join(map(str, parts))
    return {
        "prompt": dict(prompt),
        "objective": dict(objective),
        "training": {**options, **data, **model},
        "optimizer": {name: _plain(getattr(args, name)) for name in _OF_OPTIMIZER},
        **({"evaluation": dict(evaluation)} if evaluation is not None else {}),
    }


def model_identity(
    options: ModelConfig, data: DataOptions, args: ConvexConfig, tokenizer_name: str, tokenizer: Any
) -> dict[str, Any]:
    """What is trained: the model or its config, the tokenizer, each by name and content, and the adapter.

    To be called before the tokenizer is used, which changes what it says of itself.
    """
    from convexlm.training_data import tokenizer_hash

    found: dict[str, Any] = {}
    if data.config_name:
        path = Path(data.config_name)
        file = path / "config.json" if path.is_dir() else path
        content = file_sha256(file) if file.is_file() else None
        found["config"] = {"name": _short(data.config_name), "content": content}
    else:
        name, revision = str(options.model_name_or_path), revision_of(options)
        content = content_of(Path(name), "config.json", "*.safetensors", "*.safetensors.index.json")
        found["model"] = {"name": _short(name) + (f"@{revision}" if revision else ""), "content": content}
    found["tokenizer"] = {"name": _short(tokenizer_name), "content": tokenizer_hash(tokenizer)}
    found["dtype"] = str((args.model_init_kwargs or {}).get("dtype", options.dtype or "float32"))
    loading = (args.model_init_kwargs or {}).items()
    found["model_init_kwargs"] = {key: value for key, value in loading if key not in _SAME_MODEL} or None
    names = ["use_peft", *_OF_QUANTIZATION]
    names += _OF_4_BITS * bool(options.load_in_4bit) + _OF_ADAPTERS * bool(options.use_peft)
    return {**found, **{name: _plain(getattr(options, name)) for name in names}}


def content_of(path: Path, *patterns: str) -> str | None:
    """The hash of a local file, or of a folder's files of these names (default: of all); None if there are none."""
    if path.is_file():
        return _file_hash(path)
    files = sorted({file for pattern in patterns or ("**/*",) for file in path.glob(pattern) if file.is_file()})
    return json_sha256({str(file.relative_to(path)): _file_hash(file) for file in files}) if files else None


def refuse_another_training(checkpoint: Path, marker: Mapping[str, Any]) -> None:
    """See that a checkpoint is of this training.

    Args:
        checkpoint: the checkpoint to go on from.
        marker: what the checkpoints of this training have in their `convexlm.json`.

    Raises:
        UserError: it is of another model, adapter, objective, other prompts, data or settings; the first is named.
    """
    before = read_marker(checkpoint)
    for part in ("objective", "prompt", "training"):
        old: Any = before.get(part)
        if not isinstance(old, dict):
            continue
        if part == "training":  # where the marker is older than this key, the files say it
            old = {"use_peft": (checkpoint / "adapter_config.json").is_file(), **old}
        new = json.loads(json.dumps(marker[part]))
        for key in sorted(new, key=lambda key: key != "use_peft"):  # for of what it implies, this says the most
            value = new[key]
            if key not in old or (_same(old[key], value) if key in _BY_CONTENT else old[key] == value):
                continue
            then, now = _names(old[key], value) if key in _BY_CONTENT else (old[key], value)
            then, now = ("unset" if one is None else one for one in (then, now))
            raise UserError(
                f"{checkpoint}: {_WORDS.get(key, key)} was {then}, not {now}; --resume goes on with the options that "
                "a training was begun with: give those, or choose another --output_dir"
            )


def changed_optimizer(checkpoint: Path, marker: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options of optimizer and schedule that a checkpoint was trained with otherwise: then and now."""
    old = read_marker(checkpoint).get("optimizer")
    new = json.loads(json.dumps(marker.get("optimizer", {})))
    if not isinstance(old, dict):
        return {}
    return {key: (old[key], value) for key, value in new.items() if key in old and old[key] != value}


def other_evaluation(checkpoint: Path, marker: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the data to evaluate on, then and now, if they are others than when a checkpoint was saved."""
    old, new = read_marker(checkpoint).get("evaluation"), marker.get("evaluation")
    return None if old is None or new is None or _same(old, new) else _names(old, new)


def _names(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
    """What to call two things that differ, which may have one name."""
    then, now = str(old["name"]), str(new["name"])
    return (then, now) if then != now else (f"an earlier {then}", "as it is now")


def _same(old: Any, new: Any) -> bool:
    """Whether two data, models or tokenizers are the same as far as is known: by content, else by name."""
    if not isinstance(old, dict) or old.get("content") is None or new["content"] is None:
        return not isinstance(old, dict) or old.get("name") == new["name"]
    return bool(old["content"] == new["content"])


def _short(name: str) -> str:
    """A local path's last part, for folders may be moved; a hub name as it is."""
    return Path(name).name if Path(name).exists() else name


def _plain(value: Any) -> Any:
    """An option as JSON has it; the order of names in a list says nothing."""
    value = getattr(value, "value", value)
    if isinstance(value, (list, tuple, set)):
        return sorted(map(str, value))
    return value if isinstance(value, (str, int, float, bool, type(None), dict)) else str(value)


def _file_hash(file: Path) -> str:
    size = file.stat().st_size
    if size <= _WHOLE:
        return file_sha256(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in _starts(size):
            opened.seek(start)
            digest.update(opened.read(_PART))
    return digest.hexdigest()


def _starts(size: int) -> Iterable[int]:
    """Where the parts of a large file begin, from its first byte to its last."""
    return ((size - _PART) * part // (_PARTS - 1) for part in range(_PARTS))
