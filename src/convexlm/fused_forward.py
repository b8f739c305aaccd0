"""The fused head inside a model's forward: the one place that knows the internals of transformers and TRL it needs.

`add_fused_objective(model)` lets `model(**inputs, labels=..., fused_objective=call)` return the objective's loss and
statistics in place of logits; without that argument the forward is what it was, so generation and saving are
unaffected. The head runs inside the forward of the wrapped model and of the head's own module, so that whatever hooks
DDP, FSDP and DeepSpeed ZeRO-3 put there gather its weight and reduce its gradient as for any other module.

What is relied on, and held to by tests/test_fused_forward.py: `base_model` is the backbone and gives
`last_hidden_state`; `get_output_embeddings()` is the head; logits are its output times a factor and soft-capped as
the config says (the names that TRL reads, and a few more), to which `head_agreement.py` holds the model that is
trained; experts' load-balancing loss is Mixtral's.
"""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from convexlm.head import FusedOutput, fused_objective
from convexlm.label_smoothing import refuse_label_smoothing, smoothing_term
from convexlm.objectives import IGNORE_INDEX, Objective

if TYPE_CHECKING:
    from torch import Tensor

# The config's names for a factor on the logits, in TRL's order of precedence. `logits_scaling` divides instead, but
# for one model type.
FACTOR_NAMES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR_NAME, DIVISOR_IS_FACTOR = "logits_scaling", "hyperclovax"
SOFTCAP_NAME = "final_logit_softcapping"
# Names that TRL does not read: other families' caps, and of Inkling's a divisor and the rows of its output layer that
# are no padding.
OTHER_SOFTCAP_NAMES = ("logits_soft_cap", "output_logit_soft_cap")
OTHER_DIVISOR_NAME, ROWS_NAME = "logits_mup_width_multiplier", "unpadded_vocab_size"


class Statistics(dict[str, torch.Tensor]):
    """Statistics that no wrapper of a model sees into; FSDP2 would cast them with the outputs, and counts with them.

    torch's pytrees look into `dict` itself, not into what is derived from it.
    """


@dataclass
class FusedModelOutput(ModelOutput):
    """What a model returns when it is called with `fused_objective`.

    Attributes:
        loss: the objective's loss, without the experts' loss.
        statistics: as `FusedOutput.statistics()`; detached 0-d tensors, of float64 where the device has it.
        aux_loss: the experts' load-balancing loss, where router logits were asked for.
        path: "one-pass" or "recompute".
    """

    loss: torch.Tensor | None = None
    statistics: dict[str, torch.Tensor] | None = None
    aux_loss: torch.Tensor | None = None
    path: str | None = None


@dataclass(frozen=True, eq=False)
class HeadCall:
    """What to do with a batch at the head. Tensors are (batch, length), aligned with `labels` and not shifted.

    Where the model puts virtual tokens before a batch (prompt-learning adapters), the tensors are aligned at its end.

    Attributes:
        objective: from `get_objective`.
        normalizer: as `fused_objective` takes it.
        sequence_ids: which sequence of its row a token belongs to; a row is one sequence if None.
        sample_weights: each token's record weight, constant within a sequence; any number where the label is -100.
        recompute: take the recomputing path.
        chunk_tokens: as `fused_objective` takes it.
        need_entropy: also sum entropies.
        label_smoothing: as transformers' `label_smoothing_factor`, of maximum likelihood. It is in the loss and in no
            statistic.
        attended: bool, True on tokens that are no padding, for the experts' loss of a batch without `attention_mask`.
    """

    objective: Objective
    normalizer: float | Tensor | None = None
    sequence_ids: Tensor | None = None
    sample_weights: Tensor | None = None
    recompute: bool = False
    chunk_tokens: int | None = None
    need_entropy: bool = True
    label_smoothing: float = 0.0
    attended: Tensor | None = None

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> FusedOutput:
        """Loss and statistics of a batch: hidden (batch, length, H), labels (batch, length), weight (V, H)."""
        if hidden.shape[:2] != labels.shape:
            raise ValueError(
                f"labels are {tuple(labels.shape)}, but the backbone gave {tuple(hidden.shape[:2])} states"
            )
        given = next((x for x in (self.sequence_ids, self.sample_weights) if x is not None), labels)
        virtual = labels.shape[1] - given.shape[1]
        labels = labels.to(hidden.device)
        targets = labels != IGNORE_INDEX
        targets[:, : 1 + virtual] = False  # the first real token is no target, with virtual tokens before it or not
        rows, columns = targets.nonzero(as_tuple=True)

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(hidden.device)[rows, columns - virtual]

        ids = pick(self.sequence_ids)
        ids = rows if ids is None else ids.long().unique(return_inverse=True)[1] + rows * (len(rows) + 1)
        # The state before a target predicts it. index_select's gradient is a plain index_add, with no sorting.
        states = hidden.flatten(0, 1).index_select(0, rows * labels.shape[1] + columns - 1)
        targets_only, weights = labels[rows, columns], pick(self.sample_weights)
        out = fused_objective(
            states,
            weight,
            targets_only,
            ids,
            self.objective,
            self.normalizer,
            bias=bias,
            sample_weights=weights,
            logit_scale=scale,
            logit_softcap=softcap,
            chunk_tokens=self.chunk_tokens,
            need_entropy=self.need_entropy,
            recompute=self.recompute,
        )
        if not self.label_smoothing:
            return out
        if reason := refuse_label_smoothing(self.objective, softcap):
            raise ValueError(reason)
        by = out.normalizer if self.normalizer is None else torch.as_tensor(self.normalizer, device=states.device)
        term = smoothing_term(
            *(states, weight, targets_only, self.label_smoothing, by),
            bias=bias,
            sample_weights=weights,
            scale=scale,
        )
        return replace(out, loss=out.loss + term.to(out.loss))


def add_fused_objective(model: Any) -> None:
    """Let a causal model of transformers take `fused_objective=HeadCall(...)` with `labels`; see the module.

    Args:
        model: the model itself, not wrapped by PEFT, DDP or FSDP.

    Raises:
        ValueError: the model is none whose logits are a linear head on its backbone's states.
    """
    _check_model(model)
    text_config = model.config.get_text_config()
    scale, softcap = logit_transform(text_config)
    rows = vocabulary_rows(text_config)
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_objective: HeadCall | None = None, **kwargs: Any) -> Any:
        if fused_objective is None:
            # `original` is bound to the model that was patched, and a deep copy of it has weights of its own.
            return original(*args, **kwargs) if self is model else type(self).forward(self, *args, **kwargs)
        labels = kwargs.pop("labels", None)
        if labels is None:
            raise ValueError("`fused_objective` needs `labels`")
        kwargs["use_cache"] = False
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        mask = kwargs.get("attention_mask")
        mask = fused_objective.attended if mask is None else mask
        backbone = self.base_model(*args, **kwargs)
        states, head = backbone.last_hidden_state, self.get_output_embeddings()
        out = _call_head(head, fused_objective, states, labels, scale, softcap, rows)
        if kwargs.get("output_router_logits"):
            out.aux_loss = _aux_loss(text_config, backbone, mask)
        return out

    model.forward = types.MethodType(forward, model)


def keep_output_dtype(accelerator: Any) -> None:
    """Have FSDP2 leave the loss in float32: under bf16 and fp16 accelerate has it cast what a model returns.

    Args:
        accelerator: one that has not prepared the model yet.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def logit_transform(text_config: Any) -> tuple[float, float | None]:
    """The factor on a model's projected states and the soft cap on its logits, from its (text) config."""
    caps = (getattr(text_config, name, None) for name in (SOFTCAP_NAME, *OTHER_SOFTCAP_NAMES))
    softcap = next((cap for cap in caps if cap is not None), None)
    for name in FACTOR_NAMES:
        factor = getattr(text_config, name, None)
        if factor is not None:
            return float(factor), softcap
    divisors = (getattr(text_config, name, None) for name in (DIVISOR_NAME, OTHER_DIVISOR_NAME))
    divisor = next((one for one in divisors if one is not None), None)
    if divisor is None:
        return 1.0, softcap
    return (float(divisor) if text_config.model_type == DIVISOR_IS_FACTOR else 1.0 / divisor), softcap


def vocabulary_rows(text_config: Any) -> int | None:
    """How many rows of the output layer have a logit, the others being padding; None: all of them."""
    return getattr(text_config, ROWS_NAME, None)


def _check_model(model: Any) -> None:
    kind = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(head, "weight"):
        raise ValueError(f"{kind} has no linear output layer (`get_output_embeddings()`), which the fused head needs")
    if getattr(model, "base_model", model) is model:
        raise ValueError(f"{kind} has no backbone under `base_model_prefix`, whose states the fused head needs")


@torch.compiler.disable
def _call_head(
    head: Any,
    call: HeadCall,
    hidden: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    rows: int | None = None,
) -> FusedModelOutput:
    """Run `call` as the forward of the head's module, so that hooks on the module see to its weight."""
    # FSDP1's wrapper is a module of its own around the head; its forward must stay.
    inner = getattr(head, "_fsdp_wrapped_module", head)
    adapter = inner if _is_adapter(inner) else None
    if adapter is not None:
        _check_adapter(adapter)
    found: list[FusedOutput] = []

    def compute(states: Tensor) -> Tensor:
        layer = inner if adapter is None else adapter.get_base_layer()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if weight.device.type == "meta":
            raise ValueError("the output layer's weight is offloaded; the fused head needs it on a device")
        if _is_sharded(weight):
            raise ValueError(
                "the output layer's weight is still sharded inside its own forward (tensor parallelism, or a wrapper "
                "that FSDP's hooks do not reach); shard the model with FSDP2 as a whole instead"
            )
        # With the model split over devices, the backbone may end on another than the head's.
        states = states.to(weight.device)
        if adapter is not None:
            states, weight = _with_adapters(adapter, states, weight)
        if rows is not None and rows < len(weight):
            weight, bias = weight[:rows], None if bias is None else bias[:rows]
        found.append(call(states, labels, weight, bias, scale, softcap))
        return found[-1].loss

    missing = object()
    before = inner.__dict__.get("forward", missing)
    inner.__dict__["forward"] = compute
    try:
        loss = head(hidden)
    finally:
        if before is missing:
            del inner.__dict__["forward"]
        else:
            inner.__dict__["forward"] = before
    return FusedModelOutput(loss=loss, statistics=Statistics(found[-1].statistics()), path=found[-1].path)


def _is_adapter(module: Any) -> bool:
    peft_layers = sys.modules.get("peft.tuners.tuners_utils")
    return peft_layers is not None and isinstance(module, peft_layers.BaseTunerLayer)


def _check_adapter(layer: Any) -> None:
    """Refuse an adapter on the output layer other than LoRA's plain form."""
    from peft.tuners.lora import Linear

    variants = getattr(layer, "lora_variant", {})
    names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
    plain = type(layer) is Linear and not any(
        name in variants or layer.lora_B[name].bias is not None for name in names
    )
    if not plain:
        raise ValueError(
            f"this adapter on the output layer ({type(layer).__module__}.{type(layer).__name__}) is not supported: "
            "the fused head knows LoRA without DoRA, bias or quantization there; use `modules_to_save` to train the "
            "layer itself"
        )


def _with_adapters(layer: Any, states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A LoRA layer as one without: h W^T + s (A h) B^T is [h, s A h] [W, B]^T, so a rank is one more state."""
    if layer.merged or layer.disable_adapters:
        return states, weight
    parts, factors = [states], [weight]
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down = layer.lora_A[name]
            low = down(layer.lora_dropout[name](states.to(down.weight.dtype))) * layer.scaling[name]
            parts.append(low.to(states.dtype))
            factors.append(layer.lora_B[name].weight.to(weight.dtype))
    return torch.cat(parts, -1), torch.cat(factors, 1)


def _is_sharded(weight: Any) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(weight, tensors.DTensor)


def experts_of(text_config: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token goes to, by the names that configs have for it.

    Raises:
        ValueError: the config has none of them, so there is no load-balancing loss.
    """
    found = [getattr(text_config, name, None) for name in ("num_experts", "num_local_experts")]
    experts, chosen = next((x for x in found if x), None), getattr(text_config, "num_experts_per_tok", None)
    if experts is None or chosen is None:
        raise ValueError(
            f"the load-balancing loss of {text_config.model_type} is not known: its config says neither `num_experts` "
            "nor `num_local_experts` with `num_experts_per_tok`; train without it, with `router_aux_loss_coef=0.0`"
        )
    return experts, chosen


def _aux_loss(text_config: Any, backbone: Any, mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    if not (router_logits := getattr(backbone, "router_logits", None)):
        raise ValueError(
            f"this model ({text_config.model_type}) gives no router logits, as where its config switches experts off, "
            "so it has no load-balancing loss; train without it, with `router_aux_loss_coef=0.0`"
        )
    return load_balancing_loss_func(
        router_logits,
        *experts_of(text_config),
        mask,  # None where every token counts
    )
