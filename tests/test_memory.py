from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from convexlm.errors import UserError
from convexlm.known_models import NAMES, find_config
from convexlm.memory import SHARDINGS, ZERO_BUCKET_ELEMENTS, MemoryEstimate, estimate_memory, gigabytes
from convexlm.memory_step import StepShape, empty_model, trace_step

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory.py"
SMALL = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    attn_implementation="sdpa",
)
PARAMETERS = 2 * 1000 * 64 + 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176 + 2 * 64)


def small(**options: Any) -> MemoryEstimate:
    return estimate_memory(SMALL, **{"batch": 2, "length": 64, **options})


def lora(modules: Any = "all-linear", rank: int = 4) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, target_modules=modules, task_type="CAUSAL_LM")


KNOWN = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", [*KNOWN, *NAMES])
def test_known_shapes_have_their_models_parameters(name: str) -> None:
    config, _ = find_config(name)
    model = empty_model(config, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == KNOWN[NAMES.get(name, name)]
    assert all(p.device.type == "meta" for p in model.parameters())


def test_tied_weights_are_counted_once() -> None:
    config = copy.deepcopy(SMALL)
    config.tie_word_embeddings = True
    found = estimate_memory(config, batch=1, length=32)
    assert found.parameters == PARAMETERS - 1000 * 64
    real = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.gradients == 4 * found.parameters


def test_a_folders_own_config_comes_first(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    config, origin = find_config(tmp_path)
    assert (config.hidden_size, origin) == (64, "its config.json")
    assert find_config("nobody/has-this")[0] is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "weights", "gradients", "optimizer"),
    [
        ({}, 4, 4, 8),
        ({"mixed_precision": "bf16"}, 4, 4, 8),
        ({"dtype": "bfloat16"}, 2, 2, 4),
        ({"optimizer": "sgd"}, 4, 4, 0),
        ({"optimizer": "adamw_torch"}, 4, 4, 8),
        ({"optimizer": "lion_32bit"}, 4, 4, 4),
        ({"optimizer": "paged_adamw_8bit"}, 4, 4, 2),
        ({"sharding": "ddp", "processes": 4}, 4, 4, 8),
        ({"sharding": "fsdp2", "processes": 4}, 4 / 4, 4 / 4, 8 / 4),
        ({"sharding": "fsdp2", "processes": 4, "mixed_precision": "bf16"}, 4 / 4, 4 / 4, 8 / 4),
        ({"sharding": "zero2", "processes": 8, "mixed_precision": "bf16"}, 2, 2 + 4 / 8, 12 / 8),
        ({"sharding": "zero1", "processes": 8, "mixed_precision": "fp16"}, 2, 2 + 4 / 8, 12 / 8),
        ({"sharding": "zero3", "processes": 8, "mixed_precision": "bf16"}, 2 / 8, 4 / 8, 12 / 8),
        ({"sharding": "zero3_offload", "processes": 8, "mixed_precision": "bf16"}, 0, 0, 0),
        ({"sharding": "zero3_offload_optimizer", "processes": 8, "mixed_precision": "bf16"}, 2 / 8, 0, 0),
        ({"sharding": "zero3_offload_parameters", "processes": 8, "mixed_precision": "bf16"}, 0, 4 / 8, 12 / 8),
        ({"sharding": "zero1_offload", "processes": 8, "mixed_precision": "bf16"}, 2, 2, 0),
        ({"sharding": "fsdp2_offload", "processes": 4}, 0, 0, 0),
    ],
)
def test_bytes_of_a_parameter(options: dict[str, Any], weights: float, gradients: float, optimizer: float) -> None:
    found = small(**options)
    assert found.parameters == found.trainable == PARAMETERS
    for given, expected in ((found.weights, weights), (found.gradients, gradients), (found.optimizer, optimizer)):
        assert given == pytest.approx(expected * PARAMETERS, abs=1000)  # inverse frequencies, rounding
    assert found.total == found.peak + found.framework
    assert found.peak >= found.weights + found.gradients + found.optimizer


def test_deepspeeds_own_sums() -> None:
    """Its estimators: 4 P + 16 P / n for stage 2, 18 P / n for stage 3, and 16 to 18 bytes on the host."""
    two = small(sharding="zero2", processes=8, mixed_precision="bf16")
    assert two.weights + two.gradients + two.optimizer == pytest.approx((4 + 16 / 8) * PARAMETERS, rel=0.001)
    three = small(sharding="zero3", processes=8, mixed_precision="bf16")
    assert three.weights + three.gradients + three.optimizer == pytest.approx(18 / 8 * PARAMETERS, rel=0.001)
    offloaded = small(sharding="zero3_offload", processes=8, mixed_precision="bf16")
    assert offloaded.host == pytest.approx(18 / 8 * PARAMETERS, rel=0.001)
    assert offloaded.peak < three.peak
    # What is taken off the device is on the host, whichever it is.
    for name in ("zero3_offload_optimizer", "zero3_offload_parameters"):
        part = small(sharding=name, processes=8, mixed_precision="bf16")
        assert part.weights + part.gradients + part.optimizer + part.host == pytest.approx(offloaded.host, abs=8)
        assert offloaded.peak < part.peak < three.peak and part.gathered == three.gathered
    fsdp, off = small(sharding="fsdp2", processes=4), small(sharding="fsdp2_offload", processes=4)
    assert off.host == fsdp.weights + fsdp.gradients + fsdp.optimizer and off.gathered == fsdp.gathered


def test_ddp_buckets_and_one_process() -> None:
    alone, four = small(), small(sharding="ddp", processes=4)
    assert four.buckets == four.gradients and alone.buckets == 0
    assert four.peak == alone.peak + four.buckets
    assert small(sharding="ddp", processes=1).peak == alone.peak


def test_zeros_buckets_and_float32_copies() -> None:
    """What DeepSpeed's estimators leave out, as measured with two processes on a CPU (results/memory.md)."""
    two, three = (small(sharding=name, processes=4) for name in ("zero2", "zero3"))
    assert two.optimizer == 12 * PARAMETERS // 4, "stage 2 copies its part of float32 weights, too"
    assert three.optimizer == 8 * PARAMETERS // 4, "stage 3 does not"
    gradients = 4 * PARAMETERS
    assert two.buckets == gradients and three.buckets == 2 * gradients + gradients // 4
    on_a_gpu = small(sharding="zero2", processes=4, device="cuda", device_bytes=2**34, mixed_precision="bf16")
    assert on_a_gpu.buckets == 2 * ZERO_BUCKET_ELEMENTS, "all of it, however small the model"
    assert on_a_gpu.peak > on_a_gpu.buckets + on_a_gpu.weights + on_a_gpu.optimizer


def test_a_checkpoint_holds_weights_and_both_moments() -> None:
    found = small()
    assert found.checkpoint_weights == 4 * PARAMETERS and found.checkpoint == 12 * PARAMETERS
    adapter = small(peft_config=lora())
    assert adapter.checkpoint_weights == 4 * adapter.trainable and adapter.checkpoint == 12 * adapter.trainable


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("rank", [1, 8])
def test_lora_counts_are_pefts(modules: Any, rank: int) -> None:
    from peft import get_peft_model

    trained, everything = get_peft_model(
        AutoModelForCausalLM.from_config(copy.deepcopy(SMALL)), lora(modules, rank)
    ).get_nb_trainable_parameters()
    found = small(peft_config=lora(modules, rank))
    assert (found.trainable, found.parameters) == (trained, everything)
    assert found.gradients == 4 * trained and found.optimizer == 8 * trained
    assert found.weights == pytest.approx(4 * everything, abs=1000)


def test_quantized_weights() -> None:
    linear = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
    rest = 2 * (PARAMETERS - linear)
    options = {"dtype": "bfloat16", "peft_config": lora()}
    four, nested, eight = (
        small(quantized="4bit", **options),
        small(quantized="4bit", double_quantized=True, **options),
        small(quantized="8bit", **options),
    )
    adapter = 2 * four.trainable  # TRL keeps adapters of quantized models in bfloat16
    assert four.gradients == adapter
    assert four.weights == pytest.approx(linear * (0.5 + 4 / 64) + rest + adapter, abs=1000)
    assert nested.weights == pytest.approx(linear * (0.5 + 1 / 64 + 4 / 64 / 256) + rest + adapter, abs=1000)
    assert eight.weights == pytest.approx(linear + rest + adapter, abs=1000)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_the_forward_pass_keeps_is_what_autograd_keeps(
    attention: str, autocast: torch.dtype | None, kind: str
) -> None:
    """The oracle: a real model on real tensors, and autograd's own hook for what it saves."""
    values = {k: v for k, v in SMALL.to_dict().items() if k not in ("model_type", "architectures")}
    config = SMALL if kind == "llama" else Qwen3Config(**{**values, "head_dim": 16, "layer_types": None})
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    ids = torch.zeros(2, 64, dtype=torch.long)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    saved = sum(storage.nbytes() for storage in kept.values())
    shape = StepShape(2, 64, attention=attention, autocast=autocast, checkpointing=False, masked=False)
    counted = trace_step(config, shape).saved
    assert states.requires_grad
    # Beside what is saved, the counted model holds its inputs, the last states and the rotary tables.
    assert saved <= counted + 65536 and counted <= 1.05 * saved + 131072


def test_checkpointing_keeps_a_state_a_layer() -> None:
    config = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 6})
    shape = StepShape(4, 128, checkpointing=True, masked=False)
    three, six = trace_step(SMALL, shape).saved, trace_step(config, shape).saved
    assert six - three == pytest.approx(3 * 4 * 128 * 64 * 4, rel=0.02)
    without = estimate_memory(SMALL, batch=4, length=128, gradient_checkpointing=False)
    assert estimate_memory(SMALL, batch=4, length=128).peak < without.peak


def test_the_heads_chunk_is_the_heads() -> None:
    from convexlm.head_chunks import default_chunk_tokens

    found = small(batch=1, length=64)
    assert found.head_tokens == min(64, default_chunk_tokens(1000, 4, torch.device("cpu")))
    assert small(head_chunk_tokens=16).head_tokens == 16
    assert small(head_chunk_tokens=16).head < small().head
    seven, _ = find_config("llama-7b")
    card = estimate_memory(
        seven, batch=8, length=2048, mixed_precision="bf16", device="cuda", device_bytes=24 * 2**30, sharding="fsdp2"
    )
    assert card.head_tokens == 24 * 2**30 // 64 // (32000 * 2) // 64 * 64


def test_more_of_anything_is_no_less_memory() -> None:
    base = small().peak
    for more in ({"batch": 8}, {"length": 200}, {"accumulation": 4}, {"gradient_checkpointing": False}):
        assert small(**more).peak >= base, more
    assert [small(sharding="zero3", processes=n, mixed_precision="bf16").weights for n in (1, 2, 4)] == sorted(
        (small(sharding="zero3", processes=n, mixed_precision="bf16").weights for n in (1, 2, 4)), reverse=True
    )


def test_an_estimate_is_json_and_adds_up() -> None:
    for sharding in SHARDINGS:
        found = small(sharding=sharding, processes=2, mixed_precision="bf16")
        assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
        steady = found.weights + found.optimizer
        during = steady + found.gathered + found.buckets + found.peak_gradients + found.peak_working
        assert found.peak >= during


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(ValueError, match="sharding is one of"):
        small(sharding="zero9")
    with pytest.raises(ValueError, match="unknown dtype"):
        small(dtype="float7")
    assert any("counted as Adam" in note for note in small(optimizer="muon").notes)
    experts = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500,
    )  # fmt: skip
    try:
        assert estimate_memory(experts, batch=1, length=32).peak > 0
    except ValueError as error:
        assert "\n" not in str(error) and "cannot be counted" in str(error)


def test_gigabytes() -> None:
    assert (gigabytes(26_953_662_464), gigabytes(12_300_000)) == ("27.0 GB", "12 MB")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    "case",
    [
        {"model": "20m", "batch": 8, "length": 128, "gradient_checkpointing": False},
        {"model": "20m", "batch": 8, "length": 192, "gradient_checkpointing": False, "lora": "all-linear"},
    ],
)
def test_a_measured_peak(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider than the 15 % of results/memory.md, for a busy machine's resident sets are noisy."""
    sys.path.insert(0, str(BENCHMARK.parent))
    try:
        import memory as benchmark  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(BENCHMARK.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = benchmark.estimate_of(case).peak
    told = benchmark.child(case, "returning")
    assert told["peak"] - told["base"] == pytest.approx(expected, rel=0.25)
