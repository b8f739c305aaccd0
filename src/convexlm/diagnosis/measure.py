"""One pass of a model over tokenized records: the log-probability of every target token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convexlm.diagnosis.batches import NOTES, padded, plan_batches, rows_together
from convexlm.errors import UserError
from convexlm.fused_forward import logit_transform, vocabulary_rows
from convexlm.head_scores import TokenScores, token_scores
from convexlm.objectives import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a model gives the targets of n records, one after the other.

    Attributes:
        lengths: (n,) int64, target tokens of each record (its T), the EOS among them.
        log_probs: (sum of lengths,) float32, log-probability in nats of every target token.
        logit_norms: as `log_probs`: the length of the gradient of a token's log-probability with respect to the
            model's logits, from 0 (the token is certain) to below sqrt(2).
        ends: (n,) bool, whether the record's last target is the EOS, and not cut off.
    """

    lengths: np.ndarray
    log_probs: np.ndarray
    logit_norms: np.ndarray
    ends: np.ndarray

    @property
    def m(self) -> np.ndarray:
        """(n,) float64: every record's mean log-probability."""
        return np.add.reduceat(self.log_probs.astype(np.float64), self._starts) / self.lengths

    @property
    def end_log_probs(self) -> np.ndarray:
        """The EOS's log-probability in the records that end in it, float64."""
        return self.log_probs[self._starts + self.lengths - 1][self.ends].astype(np.float64)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, to be stored."""
        return {name: getattr(self, name) for name in ("lengths", "log_probs", "logit_norms", "ends")}


def measure(
    model: Any,
    rows: Sequence[dict[str, Any]],
    *,
    eos_token_id: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """The log-probabilities of all targets, in batches of rows of about one length and without gradients.

    Target positions go through the fused head, so the logits of a whole batch are never held. Log-probabilities are
    taken in float32, whatever the model computes in (float64 for a float64 model). Where a row's numbers depend on the
    batch's other rows, it is measured without them (see `rows_together`).

    Args:
        model: a causal model of transformers, in evaluation mode.
        rows: from `tokenize_records`: `input_ids`, and `labels` that are -100 on the prompt.
        eos_token_id: what ends an answer.
        batch_size: rows a batch; None: as many as a fixed number of tokens allows. It changes no result beyond
            rounding.
        progress: called with rows done, all rows, and seconds so far.
        note: is told why rows are not measured together.

    Raises:
        UserError: a token's log-probability is not a number (an overflow in float16, or a broken checkpoint), or
            one row alone takes too much memory.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {batch_size}")
    begun = time.monotonic()
    device = next(model.parameters()).device
    targets = [[label for label in row["labels"] if label != IGNORE_INDEX] for row in rows]
    found: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(rows)
    done = 0
    with torch.inference_mode():
        try:
            fused = _check_head(model, rows, device)
            together = rows_together(model)
        except (RuntimeError, MemoryError) as error:
            _halves([0], error)
            raise
        if together in NOTES:
            note(NOTES[together])
        pending = plan_batches([len(row["input_ids"]) for row in rows], batch_size, device.type, together)[::-1]
        while pending:
            batch = pending.pop()
            try:
                results = _measure_batch(model, [rows[index] for index in batch], fused, device)
            except (RuntimeError, MemoryError) as error:
                pending += _halves(batch, error)
                continue
            for index, result in zip(batch, results, strict=True):
                found[index] = result
            done += len(batch)
            if progress is not None:
                progress(done, len(rows), time.monotonic() - begun)
    whole = [result for result in found if result is not None]
    log_probs = np.concatenate([result[0] for result in whole])
    if not np.isfinite(log_probs).all():
        bad = next(row["record_id"] for row, r in zip(rows, whole, strict=True) if not np.isfinite(r[0]).all())
        raise UserError(
            f"record {bad}: the model gives a log-probability that is no number; try --dtype float32, or check its "
            f"weights"
        )
    return Measurement(
        lengths=np.array([len(target) for target in targets], dtype=np.int64),
        log_probs=log_probs,
        logit_norms=np.concatenate([result[1] for result in whole]),
        ends=np.array([target[-1] == eos_token_id for target in targets], dtype=bool),
    )


def _halves(batch: list[int], error: Exception) -> list[list[int]]:
    """The two halves of a batch that took too much memory; any other error is raised again."""
    from accelerate.utils.memory import should_reduce_batch_size

    if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        raise UserError("one record alone does not fit into memory; give a smaller --max_length") from None
    middle = len(batch) // 2
    return [batch[middle:], batch[:middle]]


def _check_head(model: Any, rows: Sequence[dict[str, Any]], device: torch.device) -> bool:
    """Whether backbone, output layer and the config's factors give the model's own numbers: tried on the shortest row.

    Where they do not, the whole model is called, which takes more memory and is right for any architecture.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if weight is None or weight.device.type == "meta" or getattr(model, "base_model", model) is model:
        return False
    if model._forward_pre_hooks or model._forward_hooks:
        # The backbone called alone leaves them out, such as those by which a SHADOW adapter begins its own state.
        return False
    shortest = [min(rows, key=lambda row: len(row["input_ids"]))]
    (whole, _) = _measure_batch(model, shortest, False, device)[0]
    try:
        (parts, _) = _measure_batch(model, shortest, True, device)[0]
    except ValueError:  # states of another width than the output layer's
        return False
    tolerance = 2e-2 if next(model.parameters()).element_size() < 4 else 1e-4
    # Where the weights are broken there is nothing to compare, and the log-probabilities will say so.
    return not bool((np.abs(whole - parts) / np.maximum(1.0, np.abs(whole)) > tolerance).any())


def _measure_batch(
    model: Any, rows: Sequence[dict[str, Any]], fused: bool, device: torch.device
) -> list[tuple[np.ndarray, np.ndarray]]:
    ids = padded([row["input_ids"] for row in rows])
    labels = padded([row["labels"] for row in rows], IGNORE_INDEX)
    mask = padded([[1] * len(row["input_ids"]) for row in rows])
    labels[:, 0] = IGNORE_INDEX  # nothing comes before the first token, so nothing predicts it
    places, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    source = model.base_model(**inputs).last_hidden_state if fused else model(**inputs).logits
    chosen = source[places.to(source.device), (columns - 1).to(source.device)]
    scores = _by_head(model, chosen, labels[places, columns]) if fused else _of_logits(chosen, labels[places, columns])
    edges = np.cumsum(torch.bincount(places, minlength=len(rows)).numpy())[:-1]
    log_probs, norms = (np.split(x.float().cpu().numpy(), edges) for x in (scores.log_probs, scores.logit_norms))
    return list(zip(log_probs, norms, strict=True))


def _by_head(model: Any, states: Tensor, labels: Tensor) -> TokenScores:
    head = model.get_output_embeddings()
    factor, softcap = logit_transform(model.config.get_text_config())
    device = head.weight.device  # of a model split over devices, the backbone may end on another
    rows = vocabulary_rows(model.config.get_text_config())
    bias = getattr(head, "bias", None)
    weight, bias = head.weight[:rows], None if bias is None else bias[:rows]
    return token_scores(
        states.to(device), weight, labels.to(device), bias=bias, logit_scale=factor, logit_softcap=softcap
    )


def _of_logits(logits: Tensor, labels: Tensor) -> TokenScores:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.to(logits.device)[:, None]
    log_probs = logits.log_softmax(-1)
    gradient = log_probs.exp().scatter_add(-1, labels, -torch.ones_like(labels, dtype=logits.dtype))
    return TokenScores(log_probs.gather(-1, labels).squeeze(-1), torch.linalg.vector_norm(gradient, dim=-1))
