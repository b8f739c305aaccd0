"""One training step on tensors without storage: which bytes live at the same time, counted and not guessed.

The model is built from its config on torch's fake tensors (the meta device, with kernels chosen as on a real one), so
a 13B model costs seconds and a few megabytes. Its own forward and backward pass run over a batch of the wished shape;
every storage is counted from its birth to its end. So attention kernels, autocast's copies, gradient checkpointing,
LoRA and any architecture of transformers are counted as they are.

Only the head is not run (it looks at numbers, which fake tensors lack): a stand-in allocates what `head.py` does.
What a kernel takes for itself and an allocator's fragmentation are not seen.
"""

from __future__ import annotations

import copy
import logging
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convexlm import head_chunks
from convexlm.head_products import CPU_TILE, bytes_of_sum, products_dtype
from convexlm.head_tiles import GPU_ROWS_BYTES, HALF, cpu_rows_bytes

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class StepShape:
    """What a step's memory depends on, beside the model's config.

    Attributes:
        batch: rows of a micro-batch.
        length: tokens of a row, padding included.
        dtype: of the weights.
        autocast: the dtype of mixed precision, None without.
        checkpointing: gradient checkpointing of every layer.
        attention: `sdpa` (also stands for flash attention, which keeps the same tensors), `eager`, or None for what
            transformers chooses.
        masked: whether rows are padded, so that attention gets a mask.
        accumulate: whether gradients of an earlier micro-batch are there already.
        device: "cpu" or "cuda"; decides how the head works.
        device_bytes: memory of that device, by which the head chooses its chunk; this machine's if None.
        chunk_tokens: the head's chunk; its default if None.
        quantized: "4bit", "8bit" or None: base weights that are unpacked a matrix at a time.
    """

    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = True
    attention: str | None = None
    masked: bool = True
    accumulate: bool = False
    device: str = "cpu"
    device_bytes: int | None = None
    chunk_tokens: int | None = None
    quantized: str | None = None


@dataclass(frozen=True)
class StepTrace:
    """Bytes of a step on one device that holds the whole model.

    Attributes:
        lives: (bytes of gradients, most bytes of other things that lived with them); weights are in neither.
        saved: bytes that the forward pass of the backbone keeps for the backward pass.
        head_kept: the head's buffers that stay between steps (on a CPU).
        head_chunk: the head's buffers while it is at work, the kept ones included; no gradient is among them.
        chunk_tokens: targets whose logits exist at a time.
        gradients: all gradients at the end of the pass.
        largest_layer: parameters of the largest repeated layer.
        outside_layers: parameters that belong to no repeated layer (embedding, head, last norm).
    """

    lives: tuple[tuple[int, int], ...]
    saved: int
    head_kept: int
    head_chunk: int
    chunk_tokens: int
    gradients: int
    largest_layer: int
    outside_layers: int


class _Tally(TorchDispatchMode):
    """Counts storages from birth to end; gradients and the rest apart."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known  # storages that were there before
        self.born: dict[int, int] = {}
        self.gradients: set[int] = set()
        self.live = self.gradient_bytes = 0
        self.lives: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or key in self.born:
            return
        self.born[key] = storage.nbytes()
        self.live += self.born[key]
        weakref.finalize(storage, self.end, key)
        self.note()

    def end(self, key: int) -> None:
        size = self.born.pop(key, 0)
        if key in self.gradients:
            self.gradients.discard(key)
            self.gradient_bytes -= size
        else:
            self.live -= size

    def became_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        if key in self.born and key not in self.gradients:
            self.gradients.add(key)
            self.live -= self.born[key]
            self.gradient_bytes += self.born[key]
            self.note()

    def note(self) -> None:
        if self.live > self.lives.get(self.gradient_bytes, -1):
            self.lives[self.gradient_bytes] = self.live


def empty_model(config: Any, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A model of this config on the meta device, in training mode: every parameter with its shape, and no storage."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    chosen = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights():
        # A copy, for building a model writes its dtype into the config.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **chosen)
    model.tie_weights()  # moving to the meta device has made two of what was one
    model.train()
    return model


def _to_fake(model: Any) -> None:
    """Replace parameters and buffers by fake ones, in place; what was shared stays shared."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, old in group.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_parameter = isinstance(old, torch.nn.Parameter)
                    made[old] = torch.nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
                group[name] = made[old]


def trace_step(config: Any, shape: StepShape, prepare: Callable[[Any], Any] | None = None) -> StepTrace:
    """Run a step of a model without storage and count what lives.

    Args:
        config: a model config of transformers.
        shape: the batch and how it is computed.
        prepare: from the bare model to the one that is trained (an adapter put on, weights frozen).

    Raises:
        ValueError: the architecture cannot be run without looking at numbers (some mixtures of experts).
    """
    try:
        return _trace_fresh(config, shape, prepare)
    except ValueError:
        if not shape.masked:
            raise
        # Some architectures take no mask but a two-dimensional one, in which they look for numbers.
        return _trace_fresh(config, replace(shape, masked=False), prepare)


def _trace_fresh(config: Any, shape: StepShape, prepare: Callable[[Any], Any] | None) -> StepTrace:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    try:
        model = empty_model(config, shape.dtype, shape.attention)
        if prepare is not None:
            model = prepare(model)
        logger.setLevel(logging.CRITICAL)  # it logs a traceback where an operation fails, which is told below
        with FakeTensorMode(allow_non_fake_inputs=True):
            _to_fake(model)
            return _trace(model, shape)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(f"{config.model_type}: a step cannot be counted without running it ({reason})") from error
    finally:
        logger.setLevel(before)


def _trace(model: Any, shape: StepShape) -> StepTrace:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if shape.checkpointing:
        causal.activation_checkpointing_enable()
        if causal is not model:
            causal.enable_input_require_grads()
    parameters = dict(model.named_parameters())
    known = {p.untyped_storage()._cdata for p in [*parameters.values(), *model.buffers()]}
    tally = _Tally(known)
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long)
    mask = torch.ones(shape.batch, 1, shape.length, shape.length, dtype=torch.bool) if shape.masked else None
    if mask is not None and causal.config._attn_implementation == "eager":  # eager attention adds its mask
        low = torch.finfo(shape.dtype).min
        mask = torch.zeros(mask.shape, dtype=shape.dtype).masked_fill(~mask, low)
    hooks = [
        p.register_post_accumulate_grad_hook(tally.became_gradient) for p in parameters.values() if p.requires_grad
    ]
    head_module = causal.get_output_embeddings()
    weight = head_module.weight
    head = _head_buffers(weight, shape)
    with tally:
        if shape.accumulate:  # as an earlier micro-batch leaves them
            for parameter in parameters.values():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    tally.became_gradient(parameter)
            tally.lives.clear()
        with torch.autocast("cpu", shape.autocast or torch.bfloat16, enabled=shape.autocast is not None):
            states = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            saved = tally.live
            picked = states.flatten(0, 1).index_select(0, torch.zeros(ids.numel(), dtype=torch.long))
            loss = _HeadStandIn.apply(picked, weight, head.passing)
            del states, picked
        loss.backward()
        del loss
        gradients = tally.gradient_bytes
    for hook in hooks:
        hook.remove()
    largest, outside = _layer_sizes(causal)
    return StepTrace(
        lives=_frontier(tally.lives),
        saved=saved,
        head_kept=head.kept,
        head_chunk=head.kept + head.passing,
        chunk_tokens=head.tokens,
        gradients=gradients,
        largest_layer=largest,
        outside_layers=outside,
    )


def _frontier(lives: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """Only the pairs that are not below another in both numbers."""
    kept: list[tuple[int, int]] = []
    for gradients, others in sorted(lives.items(), reverse=True):
        if not kept or others > kept[-1][1]:
            kept.append((gradients, others))
    return tuple(kept)


class _HeadStandIn(torch.autograd.Function):
    """Allocates what the fused head allocates: its passing buffers, and the gradients that wait for the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, passing: int) -> Tensor:
        scratch = torch.empty(passing, dtype=torch.uint8)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.empty_like(weight) if weight.requires_grad else None
        ctx.save_for_backward(d_hidden, d_weight)
        del scratch
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden, d_weight, None


@dataclass(frozen=True)
class _HeadBuffers:
    tokens: int
    kept: int
    passing: int


def _head_buffers(weight: Tensor, shape: StepShape) -> _HeadBuffers:
    """Bytes of the fused head's buffers; see `head._Pass._run` and `head_tiles` for each."""
    vocabulary, hidden = weight.shape
    on_cpu = shape.device == "cpu"
    wanted = shape.autocast or weight.dtype
    products = products_dtype("cpu", wanted) if on_cpu else wanted
    limit = shape.chunk_tokens or chunk_tokens_on(vocabulary, products.itemsize, shape.device, shape.device_bytes)
    tokens = shape.batch * shape.length
    if not (on_cpu or shape.chunk_tokens):
        spared = bytes_of_sum(weight, products) if weight.requires_grad else 0
        limit = head_chunks.widened(limit, tokens, vocabulary * products.itemsize, spared)
    chunk = min(tokens, limit)
    size, high = products.itemsize, max(products.itemsize, 4)
    rows = min(chunk, max(1, (cpu_rows_bytes() if on_cpu else GPU_ROWS_BYTES) // (vocabulary * high)))
    matrix = vocabulary * hidden
    total = chunk * vocabulary * size + 2 * rows * vocabulary * high
    total += chunk * hidden * (size if on_cpu or products not in HALF else 4)
    if weight.dtype != products:
        total += matrix * size
    passing = chunk * hidden * (size + high)  # the thin factors of the weight's gradient
    if weight.requires_grad:
        kept_dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        direct = tokens <= limit and products == kept_dtype and products != torch.float16
        if not direct and kept_dtype.itemsize < 4:
            total += matrix * 4
        if on_cpu and products in HALF and not direct:
            total += CPU_TILE * hidden * size
    return _HeadBuffers(chunk, total, passing) if on_cpu else _HeadBuffers(chunk, 0, total + passing)


def chunk_tokens_on(vocabulary: int, element_size: int, device: str, device_bytes: int | None) -> int:
    """The head's default chunk on a device of so many bytes; on this machine's own if None and it has one."""
    here = device == "cpu" or torch.cuda.is_available()
    if device_bytes is None and here:
        return head_chunks.default_chunk_tokens(vocabulary, element_size, torch.device(device))
    most = head_chunks._LARGEST_BYTES["cpu" if device == "cpu" else "other"]
    budget = most if device_bytes is None else min(most, device_bytes // head_chunks._SHARE_OF_MEMORY)
    tokens, least = int(budget // max(1, vocabulary * element_size)), head_chunks._FEWEST_TOKENS
    return max(least, tokens - tokens % least)


def _layer_sizes(causal: Any) -> tuple[int, int]:
    """Parameters of the largest repeated layer, and of all that is in none."""
    repeated = [list(module) for module in causal.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    layers = max(repeated, key=lambda group: sum(p.numel() for m in group for p in m.parameters()), default=[])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    total = sum(p.numel() for p in causal.parameters())
    return max(sizes, default=total), total - sum(sizes)
