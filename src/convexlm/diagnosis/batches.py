"""Which rows may be measured together: the others of a batch, or their padding, must not change a row's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from convexlm.decoding.generation import angles_by_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    Together = Literal["any", "length", "alone"]

TOKENS_A_BATCH = {"cpu": 4096, "cuda": 32768}
NOTES = {
    "length": "in this model a longer text in a batch changes a record's numbers, so only records of one length are "
    "measured together",
    "alone": "in this model the other texts of a batch change a record's numbers, so records are measured one at a "
    "time",
}
_SHORT, _LONG = 5, 9
# Of the spread of a position's logits, as decoding's trials have it: rounding stays well below.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.1


def rows_together(model: Any) -> Together:
    """Which rows leave each other's numbers as they are: any, those of one length, or none.

    A few tokens are run together and alone, padded as in a measurement. Of position angles that follow the longest
    text of a batch (Phi-3's longrope) a short trial shows nothing, so the config is asked, as in decoding.
    """
    size = model.config.get_text_config().vocab_size
    tokens = [(2 * place + 1) * size // (2 * 3 * _LONG) for place in range(3 * _LONG)]
    first, second, third = tokens[:_LONG], tokens[_LONG : 2 * _LONG], tokens[2 * _LONG :]
    try:
        if _differ(model, [first, second]):
            return "alone"
        if angles_by_length(model) or _differ(model, [third[:_SHORT], first]):
            return "length"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if should_reduce_batch_size(error):
            raise
        return "alone"
    return "any"


def plan_batches(
    lengths: Sequence[int], batch_size: int | None, device: str, together: Together = "any"
) -> list[list[int]]:
    """The numbers of rows in batches, the longest rows first: what does not fit into memory shows at the start.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows a batch; None: as many as `TOKENS_A_BATCH` allows.
        device: its kind.
        together: which rows may share a batch.
    """
    budget = TOKENS_A_BATCH.get(device, TOKENS_A_BATCH["cpu"])
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = []
    while order:
        longest = lengths[order[0]]
        size = 1 if together == "alone" else batch_size or max(1, budget // longest)
        batch = order[:size]
        if together == "length":
            batch = [index for index in batch if lengths[index] == longest]
        batches.append(batch)
        order = order[len(batch) :]
    return batches


def padded(texts: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """Token ids (rows, longest), padded at the right.

    There a causal model's states at the real tokens do not see the padding, so any id will do for it.
    """
    ids = torch.full((len(texts), max(map(len, texts))), fill, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return ids


def _differ(model: Any, texts: list[list[int]]) -> bool:
    """Whether the logits of texts in a batch are others than alone, beyond rounding; NaN is told elsewhere."""
    together, alone = _logits(model, texts), torch.cat([_logits(model, [text]) for text in texts])
    together, alone = (x - x.mean(-1, keepdim=True) for x in (together, alone))
    off = (together - alone).abs().amax(-1) / alone.std(-1).clamp_min(torch.finfo(alone.dtype).tiny)
    return bool((off > (_TOLERANCE_HALF if model.dtype.itemsize < 4 else _TOLERANCE)).any())


def _logits(model: Any, texts: list[list[int]]) -> torch.Tensor:
    """The logits at the texts' own positions, (sum of lengths, V)."""
    device = next(model.parameters()).device
    mask = padded([[1] * len(text) for text in texts]).to(device)
    with torch.inference_mode():
        logits = model(input_ids=padded(texts).to(device), attention_mask=mask, use_cache=False).logits
    return torch.cat([logits[row, : len(text)].float() for row, text in enumerate(texts)])
