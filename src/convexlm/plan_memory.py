"""Where one training will be, and what memory and disk it would take: the part of a dry run about the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError, first_line
from convexlm.training_model import check_adapter, peft_config_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from convexlm.config import ConvexConfig
    from convexlm.data_options import DataOptions
    from convexlm.plan_data import Sample

LARGE_MODEL = 1_000_000_000  # parameters from which a GPU is meant, though none is here


@dataclass(frozen=True)
class Planned:
    """The model of a plan, and where it will be trained.

    Attributes:
        config: its config; None if that is not at hand.
        origin: where the config is from, or why it is not at hand.
        device: `cpu` or `cuda`.
        assumed: it will be on another machine's GPU, for none is here.
    """

    config: Any
    origin: str
    device: str
    assumed: bool


def planned_model(values: Mapping[str, Any], model_config: Any, sample: Sample | None) -> Planned:
    """The model that the options name, and the device that they mean.

    Args:
        values: option names and values of `convexlm train`.
        model_config: its config, if it is not to be found by the options.
        sample: of the data, whose tokenizer says how large a new model's vocabulary is.

    Raises:
        UserError: the options name none, or its config cannot be read.
    """
    import torch

    from convexlm.known_models import find_config

    origin = "the recipe"
    if model_config is None:
        name = values.get("model_name_or_path") or values.get("config_name")
        if not name:
            raise UserError("--model_name_or_path is missing (or --config_name for a new model)")
        model_config, origin = find_config(name)
        if model_config is None:
            origin = f"{name}: {origin}"
    if model_config is not None and sample is not None and not values.get("model_name_or_path"):
        model_config.vocab_size = len(sample.tokenizer)  # as training does with a new model
    if values.get("use_cpu"):
        return Planned(model_config, origin, "cpu", False)
    if torch.cuda.is_available():
        return Planned(model_config, origin, "cuda", False)
    large = model_config is None or _without_weights(model_config.to_json_string()).num_parameters() >= LARGE_MODEL
    if large or values.get("bf16") or values.get("fp16"):
        return Planned(model_config, origin, "cuda", True)
    return Planned(model_config, origin, "cpu", False)


def check_with_model(
    planned: Planned, model_options: Any, sample: Sample | None, data: DataOptions, args: ConvexConfig
) -> None:
    """See that the model, which is not loaded, has the modules of the adapter, and takes the rows of the sample.

    Args:
        planned: the model.
        model_options: TRL's model options.
        sample: of the data.
        data: what to train on.
        args: the training options.

    Raises:
        UserError: it has not, or does not; or no record has a weight.
    """
    from convexlm.memory_count import Adapter
    from convexlm.tokenization import TokenizedRecords, build_dataset
    from convexlm.training import as_user_errors  # so that both say the same
    from convexlm.training_checks import check_rows, check_weights

    rows: Any = None
    if sample is not None:
        rows = iter(()) if data.streaming else build_dataset(TokenizedRecords(sample.rows))
        if sample.whole and not data.streaming:
            check_weights(rows, data.dataset)
    if planned.config is None or (sample is None and not model_options.use_peft):
        return
    adapter = Adapter(peft_config_of(model_options), None) if model_options.use_peft else None
    model = as_user_errors(lambda: _without_weights(planned.config.to_json_string(), adapter))
    check_adapter(model, model_options)
    if sample is not None:
        check_rows(rows, data.dataset, model, sample.tokenizer, args)


@lru_cache(maxsize=4)
def _without_weights(config_json: str, adapter: Any = None) -> Any:
    import torch

    from convexlm.memory_count import config_from_json
    from convexlm.memory_step import empty_model

    try:
        model = empty_model(config_from_json(config_json), torch.float32)
    except ValueError as error:  # of a kind that is no causal language model
        raise UserError(first_line(error)) from None
    return model if adapter is None else adapter(model)


def plan_memory(
    values: Mapping[str, Any],
    planned: Planned,
    model_options: Any,
    config: ConvexConfig,
    processes: int,
    sharding: str,
    sample: Sample | None,
) -> tuple[dict[str, Any] | None, str | None]:
    """The estimate, or None and the reason."""
    import torch

    from convexlm.collator import keeps_packed_rows
    from convexlm.memory import SHARDINGS, estimate_memory

    if sharding not in SHARDINGS:
        return None, f"how {sharding} divides a model is not counted here"
    if planned.config is None:
        return None, planned.origin
    model_config, device, assumed = planned.config, planned.device, planned.assumed
    peft_config = peft_config_of(model_options)
    quantized = "4bit" if model_options.load_in_4bit else "8bit" if model_options.load_in_8bit else None
    mixed = "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else None
    if mixed is None and values.get("bf16") is None and device == "cuda":
        mixed = "bf16" if assumed or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    attention = model_options.attn_implementation
    length, rows = _longest(config, sample), config.per_device_train_batch_size
    packs = config.packing and config.packing_strategy in ("bfd", "bfd_split")
    padded = rows > 1
    if packs and not config.padding_free and keeps_packed_rows(model_config, attention):
        padded = True  # a mask between the sequences of each row
    elif config.padding_free or packs:
        # All rows stand in one, and attention that is not flash attention needs a mask between them.
        rows, length, padded = 1, rows * length, "flash" not in str(attention)
    try:
        estimate = estimate_memory(
            model_config,
            batch=rows,
            length=length,
            dtype=model_options.dtype or "float32",
            mixed_precision=mixed,
            gradient_checkpointing=bool(config.gradient_checkpointing or config.activation_checkpointing),
            attention=attention,
            padded=padded,
            accumulation=config.gradient_accumulation_steps,
            optimizer=getattr(config.optim, "value", str(config.optim)),
            peft_config=peft_config,
            quantized=quantized,
            double_quantized=bool(model_options.use_bnb_nested_quant),
            sharding=sharding,
            processes=processes,
            device=device,
            device_bytes=None if assumed or device == "cpu" else torch.cuda.get_device_properties(0).total_memory,
            head_chunk_tokens=config.head_chunk_tokens,
        )
    except ValueError as error:
        return None, str(error)
    here = "a GPU with bf16 (none is here)" if assumed else "this machine's GPU" if device == "cuda" else "the CPU"
    added = {"device_is": here, "precision": mixed or str(model_options.dtype or "float32")}
    return {**estimate.as_dict(), "length": length, "rows": rows, "config_from": planned.origin, **added}, None


def _longest(config: ConvexConfig, sample: Sample | None) -> int:
    """The longest row that a batch may hold: the data's where all were read, else what `max_length` allows."""
    if sample is not None and not config.packing and (sample.whole or config.max_length is None):
        return max(sample.lengths)
    return int(config.max_length or 1024)


def plan_disk(
    memory: dict[str, Any] | None, config: ConvexConfig, kept: list[int], saved: list[int]
) -> dict[str, Any] | None:
    """Bytes of a checkpoint, of those that are kept, and the most there are while one is written."""
    if memory is None or not kept:
        return None
    each = memory["checkpoint_weights"] if config.save_only_model else memory["checkpoint"]
    most = len(kept) + (len(saved) > len(kept))
    return {"checkpoint": each, "kept": each * len(kept), "most": each * most}
