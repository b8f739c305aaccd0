"""Whether the fused head's logits are the model's own: asked of the model itself, before its first step.

The fused head takes logits for the output layer's product with the backbone's states, times a factor and soft-capped.
Families that put more between the two (another dense layer and a norm, as BERT's kind does) would train and evaluate
on other logits than those they generate with, and nothing fails.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from convexlm.probing import is_whole, two_records, untouched

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

logger = logging.getLogger(__name__)

# Of the largest logit: what rounding a log-probability in float32 may cost, and how many units in the last place of
# a shorter dtype.
TOLERANCE, UNITS = 1e-4, 4
INSTEAD = (
    "take another model, or a plain `transformers.Trainer` with "
    "`compute_loss_func=get_objective(...).as_compute_loss_func()`, which takes the model's own logits"
)


def refuse_other_logits(trainer: Any, model: Any) -> None:
    """Refuse a model whose own logits are not those that the fused head takes for them.

    Where the weights are spread over processes or not there yet (ZeRO-3, FSDP, meta), or the model fails on a short
    row, it is asked for parameters outside of backbone and output layer instead.

    Args:
        trainer: any Trainer, after its `accelerator` is set.
        model: the causal model, not wrapped by PEFT, after `add_fused_objective`.

    Raises:
        ValueError: the logits differ.
    """
    reason = None
    if is_whole(trainer, model):
        try:
            reason = difference(model, trainer.accelerator.autocast)
        except ValueError:
            raise  # the fused head's own, as of an adapter that it does not know
        except Exception as error:  # of a model's own code; training will tell what is wrong with it
            logger.warning(
                "could not run %s on a short row to compare its logits with the fused head's (%s: %s)",
                *(type(model).__name__, type(error).__name__, str(error).split("\n")[0]),
            )
            reason = beside_the_head(model)
    else:
        reason = beside_the_head(model)
    if reason is not None:
        raise ValueError(
            f"this model's logits ({model.config.model_type}, {type(model).__name__}) are not its output layer on its "
            f"backbone's states, which the fused head takes for them: {reason}; {INSTEAD}"
        )


def difference(
    model: Any, autocast: Callable[[], Any] = contextlib.nullcontext, device: torch.device | None = None
) -> str | None:
    """In what the fused head's logits differ from the model's own by more than rounding; None if in nothing.

    Two forward passes over one short row, in evaluation mode and without gradients. Random numbers, buffers,
    gradients and the modules' modes stay as they are.

    Args:
        model: a causal model after `add_fused_objective`.
        autocast: the context that training runs the model in.
        device: where inputs go; the embeddings' device if None.

    Raises:
        ValueError: from the fused head, or from the model.
    """
    first, second = two_records(model.config.get_text_config())
    ids = torch.tensor([first + second], device=device or model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    probe = _Probe()
    with untouched(model), torch.no_grad(), autocast():
        try:
            own = model(**inputs, use_cache=False).logits
        except ValueError as error:
            raise RuntimeError(str(error)) from error  # the model's, and not the fused head's
        model(**inputs, labels=ids, fused_objective=probe)
    if probe.misfit is not None:
        return probe.misfit
    fused = probe.logits
    if fused.shape != own.shape:
        return f"they have the shape {tuple(own.shape)}, not {tuple(fused.shape)}"
    own, fused = (x.to("cpu", torch.promote_types(x.dtype, torch.float32)) for x in (own, fused))
    finite = own.isfinite() & fused.isfinite()
    # What is usual: an expert chosen otherwise, for a near tie, changes single positions. Broken weights leave no
    # number to compare, and the first step says so.
    apart = (own.log_softmax(-1) - fused.log_softmax(-1)).abs().where(finite, torch.nan).nanmean(-1).nanmedian()
    largest = own.abs().where(finite, 1.0).amax(-1).median().clamp(min=1.0)
    if apart > max(TOLERANCE, UNITS * probe.spacing) * largest:
        return f"log-probabilities differ by {float(apart):.2g}"
    return None


def beside_the_head(model: Any) -> str | None:
    """The parameters of a model that are neither its backbone's nor its output layer's, in words; None without any."""
    known = {id(one) for part in (model.base_model, model.get_output_embeddings()) for one in part.parameters()}
    names = [name for name, one in model.named_parameters() if id(one) not in known]
    return f"`{names[0]}` belongs to neither" if names else None


class _Probe:
    """In a `HeadCall`'s place: keeps the logits that the fused head stands for."""

    attended = path = None

    def __init__(self) -> None:
        self.misfit: str | None = None
        self.logits, self.loss = torch.empty(0), torch.zeros(())
        self.spacing = 0.0  # of the shortest dtype that they went through

    def __call__(
        self,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> _Probe:
        if weight.shape[-1] != hidden.shape[-1] or not weight.is_floating_point():
            kind = f"{tuple(weight.shape)} in {weight.dtype}"
            self.misfit = f"its output layer's weight is {kind}, and a state has {hidden.shape[-1]} numbers"
            return self
        logits = linear(hidden.to(weight.dtype), weight, bias)
        self.spacing = max(torch.finfo(x.dtype).eps for x in (hidden, weight, logits))
        logits = logits.float() * scale
        self.logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return self

    def statistics(self) -> dict[str, Tensor]:
        return {}
