"""What `benchmarks/memory.py` measures: models, trainings, and what the dry run says that they take."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "11m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "20m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "58m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 8},
    "qwen3-53m": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
SHAPES["11m"]["tie_word_embeddings"] = True
PLAIN: dict[str, Any] = {"model": "58m", "batch": 4, "length": 256, "gradient_checkpointing": False}
QV = ["q_proj", "v_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "checkpointing": {**PLAIN, "gradient_checkpointing": True},
    "small, checkpointing, long": {**PLAIN, "model": "20m", "gradient_checkpointing": True, "batch": 4, "length": 768},
    "one long row": {**PLAIN, "batch": 1, "length": 768},
    "eager attention": {**PLAIN, "batch": 2, "length": 384, "attention": "eager"},
    "bf16 weights": {**PLAIN, "dtype": "bfloat16"},
    "bf16 autocast": {**PLAIN, "mixed_precision": "bf16"},
    "bf16 autocast, checkpointing": {**PLAIN, "mixed_precision": "bf16", "gradient_checkpointing": True},
    "lora, all linear": {**PLAIN, "lora": "all-linear"},
    "lora, all linear, checkpointing": {**PLAIN, "lora": "all-linear", "gradient_checkpointing": True},
    "lora, q and v, bf16 weights": {**PLAIN, "lora": QV, "dtype": "bfloat16"},
    "lora on 4 bits": {**PLAIN, "lora": "all-linear", "quantized": "4bit", "double_quantized": True},
    "lora on 4 bits, checkpointing": {
        **PLAIN,
        **{"lora": "all-linear", "quantized": "4bit", "double_quantized": True, "gradient_checkpointing": True},
    },
    "lora on 8 bits": {**PLAIN, "lora": "all-linear", "quantized": "8bit"},
    "small, large batch": {**PLAIN, "model": "20m", "batch": 16},
    "small, accumulation": {**PLAIN, "model": "20m", "accumulation": 3},
    "small, adamw_torch": {**PLAIN, "model": "20m", "optimizer": "adamw_torch"},
    "small, sgd": {**PLAIN, "model": "20m", "optimizer": "sgd"},
    "tied": {**PLAIN, "model": "11m", "batch": 8, "length": 128},
    "qwen3, grouped heads": {**PLAIN, "model": "qwen3-53m", "length": 384, "batch": 2},
    "larger": {**PLAIN, "model": "110m"},
    "larger, checkpointing": {**PLAIN, "model": "110m", "batch": 8, "gradient_checkpointing": True},
    "larger, lora": {**PLAIN, "model": "110m", "batch": 2, "lora": "all-linear"},
    "larger, lora, checkpointing": {**PLAIN, "model": "110m", "lora": "all-linear", "gradient_checkpointing": True},
    "small, lora": {**PLAIN, "model": "20m", "batch": 8, "lora": QV},
}
SHARED = {**PLAIN, "processes": 2, "gradient_checkpointing": True}
CASES |= {
    f"two processes, {sharding}": {**SHARED, "sharding": sharding} for sharding in ("ddp", "fsdp2", "zero2", "zero3")
}
CASES["two processes, fsdp2, larger"] = {**SHARED, "sharding": "fsdp2", "model": "110m"}
CASES["two processes, fsdp2, bf16 autocast"] = {**SHARED, "sharding": "fsdp2", "mixed_precision": "bf16"}
CASES["two processes, fsdp2, lora"] = {**SHARED, "sharding": "fsdp2", "lora": "all-linear"}


def config_of(name: str) -> Any:
    """The model's config."""
    from transformers import AutoConfig

    shape = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, **SHAPES[name]}
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def peft_of(case: dict[str, Any]) -> Any:
    """The adapter's config, if there is one."""
    if not case.get("lora"):
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules=case["lora"], task_type="CAUSAL_LM")


def estimate_of(case: dict[str, Any]) -> Any:
    """What the dry run would say."""
    from convexlm.memory import estimate_memory

    known = {key: value for key, value in case.items() if key not in ("model", "lora")}
    return estimate_memory(config_of(case["model"]), peft_config=peft_of(case), **known)
