"""A model tried out: whether our loops, padding at the left, and other prompts leave its probabilities as they are.

What a model does with positions and masks that it is given cannot be read off its signature, and a wrong hypothesis
looks like any other. So a few tokens are run both ways when a checkpoint has been loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from convexlm.decoding.generation.rows import Prefix, Rows
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_NUM_TOKENS = 12
# Of the spread of a position's logits. Wrong positions or masks move them by several hundredths of it and more.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.1


def loops_differ(model: Any, special: Collection[int]) -> str:
    """Why our loops do not give a model's own probabilities, tried on two short prompts; empty if they do.

    Args:
        model: a model that `why_not` has nothing against.
        special: token ids that the trial leaves out, such as padding.
    """
    tokens = _tokens(model, special)
    if not tokens:
        return ""
    head, short, long = tokens[:2], tokens[2:4], tokens[4:9]
    prompts = [head + short, head + long]
    first, second, parents = tokens[8:10], tokens[10:12], torch.tensor([[1, 0], [1, 1]], device=model.device)
    try:
        with torch.inference_mode():
            rows = Rows(model, prompts, tokens[0], Prefix(model, prompts), beams=2)
            rows.step(torch.tensor([first, first], device=model.device))
            rows.step(torch.tensor([second, second], device=model.device), parents)
            found = rows.logits
            texts = [
                [*prompt, first[parent], token]
                for prompt, chosen in zip(prompts, parents.tolist(), strict=True)
                for parent, token in zip(chosen, second, strict=True)
            ]
            alone = torch.stack([_last_logits(model, text) for text in texts])
    except UserError:  # of NaN, which decoding tells
        return ""
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        _unless_no_room(error)
        return f"a step of our loops failed in it ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return "in our loops it gave other probabilities than alone" if _differ(model, found, alone) else ""


def padding_shows(model: Any, special: Collection[int], pad_id: int) -> bool:
    """Whether a prompt's probabilities under `generate` change when it is padded at the left, as in a batch."""
    tokens = _tokens(model, special)
    if not tokens:
        return True
    prompt, fill = tokens[:5], 3
    ids = torch.tensor([[pad_id] * fill + prompt, tokens[: 5 + fill]], device=model.device)
    mask = torch.ones_like(ids)
    mask[0, :fill] = 0
    try:
        with torch.inference_mode():
            padded = [step[:1] for step in _generated(model, ids, mask, pad_id)]
            alone = _generated(model, ids[:1, fill:], mask[:1, fill:], pad_id)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        _unless_no_room(error)
        return True
    return any(_differ(model, *steps) for steps in zip(padded, alone, strict=True))


def others_show(model: Any, special: Collection[int], pad_id: int) -> bool:
    """Whether a prompt's probabilities under `generate` change with another one of its length in the batch.

    They do in RWKV (transformers 5.23): a step takes the last prompt's state for all of them.
    """
    tokens = _tokens(model, special)
    if not tokens:
        return True
    ids = torch.tensor([tokens[:5], tokens[5:10]], device=model.device)
    mask = torch.ones_like(ids)
    try:
        with torch.inference_mode():
            together = _generated(model, ids, mask, pad_id)
            each = [_generated(model, ids[row : row + 1], mask[row : row + 1], pad_id) for row in (0, 1)]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        _unless_no_room(error)
        return True
    alone = [torch.cat(steps) for steps in zip(*each, strict=True)]
    return any(_differ(model, *steps) for steps in zip(together, alone, strict=True))


def _tokens(model: Any, special: Collection[int]) -> list[int]:
    """Twelve different ordinary tokens, spread over the vocabulary; none of a vocabulary without so many."""
    size = model.config.get_text_config().vocab_size
    usual = [token for token in range(min(size, 4096)) if token not in special]
    step = len(usual) // _NUM_TOKENS
    return usual[step // 2 :: step][:_NUM_TOKENS] if step else []


def _last_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, -1].float()


def _generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, pad_id: int) -> tuple[torch.Tensor, ...]:
    """What `generate` sees at its first two steps, (rows, V) each: the second by states handed on."""
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": pad_id}
    config = GenerationConfig(**settings, output_logits=True, return_dict_in_generate=True)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return tuple(step.float() for step in output.logits)


def _differ(model: Any, found: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether logits (rows, V) differ by more than rounding or a constant a row; NaN, told elsewhere, does not."""
    found, alone = (x - x.mean(-1, keepdim=True) for x in (found, alone))
    off = (found - alone).abs().amax(-1) / alone.std(-1).clamp_min(torch.finfo(alone.dtype).tiny)
    return bool((off > (_TOLERANCE_HALF if model.dtype.itemsize < 4 else _TOLERANCE)).any())


def _unless_no_room(error: Exception) -> None:
    """Pass on an error of memory that ran out: it says nothing of the model."""
    from accelerate.utils.memory import should_reduce_batch_size

    if should_reduce_batch_size(error):
        raise error
