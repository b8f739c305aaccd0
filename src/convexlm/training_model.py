"""The model of a training: what its options say, checked, and what the trainer takes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError, first_line
from convexlm.launch.deepspeed import unsharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import ModelConfig

    from convexlm.config import ConvexConfig
    from convexlm.data_options import DataOptions


def check_model(options: ModelConfig, data: DataOptions, device_type: str | None = None) -> None:
    """See that there is one model to train, and that a local one has weights that are read.

    Args:
        options: those given.
        data: the data's, and a new model's config.
        device_type: where it will be trained; None if that is not known.

    Raises:
        UserError: none, two, or one that cannot be trained as asked.
    """
    name = options.model_name_or_path
    check_model_options(options, data)
    if options.attn_implementation == "flex_attention" and device_type == "cpu":
        raise UserError("--attn_implementation flex_attention: torch has no backward pass of it on a CPU; use sdpa")
    if data.config_name:
        if name:
            raise UserError("give --model_name_or_path (a trained model) or --config_name (a new one), not both")
        return
    if not name:
        raise UserError("--model_name_or_path is missing (or --config_name for a new model)")
    path = Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise UserError(
                    f"--model_name_or_path {name}: an adapter; merge it with its base first, with convexlm export "
                    "--merge_adapter"
                )
            raise UserError(f"--model_name_or_path {name}: no model there (config.json is missing)")
        if not list(path.glob("*.safetensors")):
            raise UserError(f"--model_name_or_path {name}: no weights in safetensors format there")


def check_model_options(options: ModelConfig, data: DataOptions) -> None:
    """See that model options can be meant, whatever files there are: also asked before anything is loaded.

    Raises:
        UserError: one has a value that it cannot have, quantized weights, which get no gradient, would be trained
            themselves, or an adapter on a new model, which no checkpoint holds.
    """
    if quantized := _quantized(options):
        if not options.use_peft:
            raise UserError(
                f"--{quantized}: quantized weights cannot be trained; give --use_peft true, or leave it out"
            )
        if data.config_name:
            raise UserError(f"--{quantized}: a new model (--config_name) has no weights to quantize; leave it out")
    _check_adapter(options)
    _check_attention(options.attn_implementation)
    if options.use_peft and data.config_name:
        raise UserError(
            "--use_peft: an adapter's checkpoints hold no base, and a new one (--config_name) is saved nowhere; train "
            "a whole model first, and give that as --model_name_or_path"
        )


def _check_adapter(options: ModelConfig) -> None:
    if not options.use_peft:
        return
    if options.lora_r < 1:
        raise UserError(f"--lora_r must be at least 1, not {options.lora_r}")
    if not 0 <= options.lora_dropout < 1:
        raise UserError(f"--lora_dropout must be at least 0 and below 1, not {options.lora_dropout}")


def _check_attention(name: str | None) -> None:
    if not name or "/" in name:  # a kernel's repository on the hub
        return
    from transformers import AttentionInterface

    known = ["eager", *(key for key in AttentionInterface().valid_keys() if "|" not in key)]
    if name not in known:
        raise UserError(f"--attn_implementation {name}: not one that transformers has; known: {', '.join(known)}")


def _quantized(options: ModelConfig) -> str | None:
    return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(options, name)), None)


def model_to_train(
    options: ModelConfig, data: DataOptions, args: ConvexConfig, tokenizer: Any
) -> tuple[PreTrainedModel | str, dict[str, Any] | None]:
    """A new model from a config, or the path and loading options that TRL takes.

    Raises:
        UserError: the config of a new model cannot be used.
    """
    if data.config_name:
        return _new_model(data.config_name, tokenizer, args, options), None
    loading: dict[str, Any] = {"use_safetensors": True, **(args.model_init_kwargs or {})}
    loading.setdefault("dtype", options.dtype or "float32")
    if options.attn_implementation:
        loading.setdefault("attn_implementation", options.attn_implementation)
    if revision := revision_of(options):
        loading.setdefault("revision", revision)
    return str(options.model_name_or_path), loading


def revision_of(options: ModelConfig) -> str | None:
    """The branch, tag or commit of a model on the hub; None for its default, and for a local folder."""
    name, revision = options.model_name_or_path, options.model_revision
    return None if not name or Path(name).exists() or revision == "main" else str(revision)


def _new_model(config_name: str, tokenizer: Any, args: ConvexConfig, options: ModelConfig) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # Said in so many words, for else transformers would ask on the terminal.
    code = {"trust_remote_code": bool(args.trust_remote_code)}
    extra: dict[str, Any] = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    if options.dtype != "auto":  # which is the config's own
        extra["dtype"] = options.dtype or "float32"
    try:
        config = AutoConfig.from_pretrained(config_name, **special, **code)
        set_seed(args.seed)
        with unsharded(args):
            return AutoModelForCausalLM.from_config(config, **extra, **code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--config_name {config_name}: {first_line(error)}") from None


def check_adapter(model: Any, options: ModelConfig) -> None:
    """See that every module that is named for an adapter is in the model: PEFT is content with one.

    Args:
        model: wrapped by PEFT or not.
        options: those given.

    Raises:
        UserError: one is not; the nearest names are told.
    """
    if not options.use_peft:
        return
    names = {name for name, _ in model.get_base_model().named_modules()}
    last = sorted({end for name in names if (end := name.rpartition(".")[2]) and not end.isdecimal()})
    for option in ("lora_target_modules", "lora_modules_to_save"):
        given = getattr(options, option) or []
        for module in [given] if isinstance(given, str) else given:
            if module == "all-linear" or any(f".{name}".endswith(f".{module}") for name in names):
                continue
            near = difflib.get_close_matches(module, last, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(last)}"
            raise UserError(f"--{option}: the model has no module `{module}`{hint}")


def peft_config_of(options: ModelConfig) -> Any:
    """The adapter to train, as PEFT's config; None if the model itself is trained."""
    from trl import get_peft_config

    modules = options.lora_target_modules
    config = get_peft_config(options)
    if config is not None and isinstance(modules, str) and modules != "all-linear":
        # TRL takes a list of one module apart, and PEFT reads a bare string as a pattern for the whole name.
        config.target_modules = {modules}
    if config is not None:
        config.revision = revision_of(options)  # by which decoding and export find the base that was trained on
    return config
