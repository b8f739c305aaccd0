"""How much memory a training run takes on each device, before anything is loaded.

Activations, gradients and what lives only for a moment are counted by running a step on tensors without storage
(`memory_step`). Here they are put together with weights and optimizer, and divided as the sharding does:

| sharding | weights | gradients | optimizer | in addition |
|---|---|---|---|---|
| `none`, `ddp` | all | all | all | with several processes, DDP's buckets: all gradients once more |
| `fsdp2` | 1/n | 1/n | 1/n | two layers and what is in no layer, gathered; two layers' whole gradients |
| `fsdp2_offload` | on the host | on the host | on the host | gathered, as `fsdp2` |
| `zero1`, `zero2` | all, 16-bit | all 16-bit, and 1/n in float32 | 1/n | a bucket |
| `zero1_offload`, `zero2_offload` | all, 16-bit | all 16-bit | on the host | a bucket |
| `zero3` | 1/n, 16-bit | 1/n in float32 | 1/n | a bucket; gathered: at most 1e9 parameters (`max_live_parameters`) |
| `zero3_offload_optimizer` | 1/n, 16-bit | on the host | on the host | gathered, as `zero3` |
| `zero3_offload_parameters` | on the host | 1/n in float32 | 1/n | gathered, as `zero3` |
| `zero3_offload` | on the host | on the host | on the host | gathered, as `zero3` |

Under ZeRO the optimizer's share holds a float32 copy of the weights (stage 3 in float32 has none); those bytes are of
DeepSpeed's own estimators (4 + 16/n a parameter for stage 2, 18/n for stage 3). Its bucket of gradients, which they
leave out, is one of `reduce_bucket_size` (5e8, DeepSpeed's default); stage 3 lays it out once more to exchange it.
DDP, FSDP2 and ZeRO were measured with two processes on a CPU (results/memory.md), on GPUs they are arithmetic.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from convexlm.errors import UserError
from convexlm.memory_count import Adapter, ModelCount, config_from_json, count_model
from convexlm.memory_step import StepShape, StepTrace, trace_step

SHARDINGS = (
    *("none", "ddp", "fsdp2", "fsdp2_offload", "zero1", "zero1_offload", "zero2", "zero2_offload"),
    *("zero3", "zero3_offload_optimizer", "zero3_offload_parameters", "zero3_offload"),
)
FRAMEWORK_BYTES = {"cpu": 580_000_000, "cuda": 700_000_000}
"""What a process takes before it has a model: between two CPU machines' (benchmarks/memory.py); a usual CUDA context's
size, assumed and not measured."""
BITSANDBYTES_BYTES = 50_000_000
"""What that package adds to it, on a CPU."""

ZERO3_LIVE_PARAMETERS = 1_000_000_000
ZERO_BUCKET_ELEMENTS = 500_000_000
_ADAM_LIKE = 2
# Copies of each trainable weight that an optimizer keeps. Names are those of transformers' `optim`.
_STATES = {
    **dict.fromkeys(("sgd", "sgd_bnb"), 0),
    **dict.fromkeys(("adagrad", "rmsprop", "lion_32bit", "paged_lion_32bit"), 1),
}
_EIGHT_BIT = ("8bit", "4bit")  # bitsandbytes' and torchao's small states, by their names' ends


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training run, per device unless said otherwise.

    Not everything lives at the same time (activations end as gradients begin), so `peak` is less than the sum of the
    parts: it is weights + optimizer + gathered + buckets + `peak_gradients` + `peak_working`, or weights + optimizer +
    gradients + `optimizer_working` if that is more.

    Attributes:
        device: "cpu" or "cuda".
        sharding: one of `SHARDINGS`.
        processes: how many share the work.
        parameters: of the model, adapters included, as transformers counts them.
        trainable: parameters that get a gradient.
        weights: the model's, adapters and quantization constants included.
        gradients: once all are there.
        optimizer: its states, with a float32 copy of the weights where it keeps one.
        optimizer_working: what the optimizer's step takes beside that.
        activations: what the forward pass keeps for the backward pass.
        head: the fused head's buffers while it works: the logits of one chunk, and their float32 rows.
        head_tokens: target tokens in that chunk.
        gathered: parameters (and, for FSDP2, gradients) that are whole for a moment; unpacked quantized weights.
        buckets: communication buffers of DDP or ZeRO.
        peak_gradients: gradients at the moment of most memory in the forward and backward pass.
        peak_working: activations, head and temporary tensors at that moment, or the head's kept buffers.
        peak: most at any moment, without the framework.
        framework: what a process takes before it has a model.
        total: peak + framework.
        host: memory of the host for what is offloaded, per process.
        checkpoint: a checkpoint on the disk, optimizer included; of all processes together.
        checkpoint_weights: the part of it that is weights or adapter.
        notes: what the numbers do not cover, in words.
    """

    device: str
    sharding: str
    processes: int
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_working: int
    activations: int
    head: int
    head_tokens: int
    gathered: int
    buckets: int
    peak_gradients: int
    peak_working: int
    peak: int
    framework: int
    total: int
    host: int
    checkpoint: int
    checkpoint_weights: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of all attributes."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


def estimate_memory(
    config: Any,
    *,
    batch: int = 1,
    length: int = 1024,
    dtype: str | torch.dtype = "float32",
    mixed_precision: str | None = None,
    gradient_checkpointing: bool = True,
    attention: str | None = None,
    padded: bool | None = None,
    accumulation: int = 1,
    optimizer: str = "adamw_torch_fused",
    peft_config: Any = None,
    quantized: str | None = None,
    double_quantized: bool = False,
    sharding: str = "none",
    processes: int = 1,
    device: str = "cpu",
    device_bytes: int | None = None,
    head_chunk_tokens: int | None = None,
) -> MemoryEstimate:
    """The memory of training a causal model of this config with `ConvexTrainer`.

    Args:
        config: a model config of transformers.
        batch: rows of a micro-batch on one device.
        length: tokens of its longest row (of the whole row, if packed).
        dtype: of the loaded weights; "auto" is the config's own.
        mixed_precision: "bf16", "fp16" or None.
        gradient_checkpointing: recompute every layer in the backward pass.
        attention: transformers' `attn_implementation`, its own choice if None; flash attention counts as `sdpa`.
        padded: whether rows differ in length, so that attention gets a mask; by default if there are several.
        accumulation: micro-batches of an optimizer step.
        optimizer: transformers' `optim`.
        peft_config: an adapter's config; the rest of the model is then frozen.
        quantized: "4bit" or "8bit" base weights of bitsandbytes.
        double_quantized: whether quantization constants are quantized, too.
        sharding: one of `SHARDINGS`.
        processes: devices that share the work.
        device: "cpu" or "cuda".
        device_bytes: memory of the device, by which the head chooses its chunk.
        head_chunk_tokens: the head's chunk.

    Raises:
        ValueError: an unknown sharding, dtype or device, or an architecture that cannot be counted.
    """
    if sharding not in SHARDINGS or device not in FRAMEWORK_BYTES or processes < 1 or min(batch, length) < 1:
        raise ValueError(
            f"sharding is one of {', '.join(SHARDINGS)} and device cpu or cuda; batch, length and processes are at "
            f"least 1: not {sharding!r}, {device!r}, {batch}, {length}, {processes}"
        )
    loaded = _dtype((getattr(config, "dtype", None) or "float32") if dtype == "auto" else dtype)
    mixed = {None: None, "no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    shards = sharding not in ("none", "ddp")
    computed = (mixed or loaded) if shards else loaded  # gathered weights have the dtype of the products
    eager = attention == "eager"
    shape = StepShape(
        batch=batch,
        length=length,
        dtype=computed,
        autocast=None if shards else mixed,
        checkpointing=gradient_checkpointing,
        attention=attention if attention in (None, "eager") else "sdpa",
        masked=eager or (batch > 1 if padded is None else padded),
        accumulate=accumulation > 1,
        device=device,
        device_bytes=device_bytes,
        chunk_tokens=head_chunk_tokens,
        quantized=quantized,
    )
    trace = _trace(config.to_json_string(), shape, Adapter(peft_config, quantized))
    model = count_model(config.to_json_string(), loaded, Adapter(peft_config, quantized), quantized, double_quantized)
    return _put_together(trace, model, optimizer, sharding, processes, shape)


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}; known: float32, bfloat16, float16")
    return found


@lru_cache(maxsize=32)
def _trace(config_json: str, shape: StepShape, adapter: Adapter) -> StepTrace:
    return trace_step(config_from_json(config_json), shape, adapter)


def _put_together(
    trace: StepTrace, model: ModelCount, optimizer: str, sharding: str, processes: int, shape: StepShape
) -> MemoryEstimate:
    notes: list[str] = []
    n, size = processes, shape.dtype.itemsize
    states, known = _state_bytes(optimizer, model)
    if shape.autocast not in (None, shape.dtype):
        notes.append(f"activations hold mixed precision's copies of the weights, {gigabytes(model.parameters * 2)}")
    if not known:
        notes.append(f"the optimizer {optimizer} is counted as Adam")
    weights, gradients, scale, host = model.weights, trace.gradients, 1.0, 0
    gathered = buckets = 0
    stored_optimizer = states
    half = size == 2
    if sharding in ("none", "ddp"):
        buckets = gradients if n > 1 else 0
    elif sharding in ("fsdp2", "fsdp2_offload"):
        weights, gradients, states = weights // n, model.trainable_bytes // n, states // n
        trained_share = model.trainable / model.parameters
        layers = 2 * trace.largest_layer
        gathered = int((layers * (1 + trained_share) + trace.outside_layers) * size)
        if sharding == "fsdp2_offload":
            host, weights, gradients, states = weights + gradients + states, 0, 0, 0
    else:
        # 16-bit weights, a float32 copy of the trained ones with the optimizer, gradients summed in float32.
        weights = model.parameters * size if not shape.quantized else weights
        master = 4 * model.trainable if half or not sharding.startswith("zero3") else 0
        exchanged = min(ZERO_BUCKET_ELEMENTS, model.trainable) * size
        # On a GPU the bucket is there as a whole; on a CPU what was never written to takes nothing.
        buckets = exchanged if shape.device == "cpu" else ZERO_BUCKET_ELEMENTS * size
        if sharding.startswith("zero3"):
            buckets += exchanged + exchanged // n
        stored_optimizer = states = 2 * 4 * model.trainable + master if known else states + master
        summed = 4 * model.trainable if half else 0
        whole = model.trainable * size
        if sharding in ("zero1", "zero2"):
            gradients, states = whole + summed // n, states // n
        elif sharding in ("zero1_offload", "zero2_offload"):
            gradients, host, states = whole, (states + summed) // n, 0
        else:
            gathered = min(model.parameters, ZERO3_LIVE_PARAMETERS) * size
            weights, gradients, states = weights // n, (summed or whole) // n, states // n
            if sharding in ("zero3_offload", "zero3_offload_parameters"):
                host, weights = host + weights, 0
            if sharding in ("zero3_offload", "zero3_offload_optimizer"):
                host, gradients, states = host + gradients + states, 0, 0
    if trace.gradients:
        scale = gradients / trace.gradients
    gathered += int(model.largest_quantized * 2)
    at_peak = max(trace.lives, key=lambda pair: pair[0] * scale + pair[1])
    working = at_peak[1] + trace.head_kept
    # Fused optimizers work in place; the others hold a matrix (a CPU) or all updates (foreach, on a GPU) at a time.
    updating = (
        0 if "fused" in optimizer or shape.device == "cpu" or sharding not in ("none", "ddp", "fsdp2") else gradients
    )
    during = int(at_peak[0] * scale) + working + gathered + buckets
    stepping = gradients + updating + buckets + trace.head_kept
    peak = weights + states + max(during, stepping)
    adapter_only = model.trainable < model.parameters
    stored = (
        model.trainable_bytes
        if adapter_only
        else model.parameters * (size if sharding.startswith("zero") else model.weights // max(1, model.parameters))
    )
    framework = FRAMEWORK_BYTES[shape.device] + BITSANDBYTES_BYTES * bool(shape.quantized)
    return MemoryEstimate(
        device=shape.device,
        sharding=sharding,
        processes=n,
        parameters=model.parameters,
        trainable=model.trainable,
        weights=weights,
        gradients=gradients,
        optimizer=states,
        optimizer_working=updating,
        activations=trace.saved,
        head=trace.head_chunk,
        head_tokens=trace.chunk_tokens,
        gathered=gathered,
        buckets=buckets,
        peak_gradients=int(at_peak[0] * scale),
        peak_working=working,
        peak=peak,
        framework=framework,
        total=peak + framework,
        host=host,
        checkpoint=stored + stored_optimizer,
        checkpoint_weights=stored,
        notes=tuple(notes),
    )


def _state_bytes(optimizer: str, model: ModelCount) -> tuple[int, bool]:
    """Bytes of the optimizer's states for all trainable parameters, and whether the optimizer is known."""
    name = str(optimizer).lower()
    if name == "adafactor":  # a row and a column of each matrix in place of its squares: little beside the weights
        return model.trainable_bytes // 256, True
    if name.endswith(_EIGHT_BIT) or "_8bit" in name:
        copies = 1 if "lion" in name else _ADAM_LIKE
        return int(copies * model.trainable * (0.5 if name.endswith("4bit") else 1)), True
    return _STATES.get(name, _ADAM_LIKE) * model.trainable_bytes, name in _STATES or "adam" in name


def gigabytes(count: float) -> str:
    """Bytes for people: `26.9 GB`, `812 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def check_sharding(name: str) -> str:
    """The sharding that a launch configuration stands for.

    Raises:
        UserError: it stands for none.
    """
    known = {"single_gpu": "none", "multi_gpu": "ddp", **{each: each for each in SHARDINGS}}
    if name not in known:
        raise UserError(f"unknown sharding `{name}`; known: {', '.join(known)}")
    return known[name]
