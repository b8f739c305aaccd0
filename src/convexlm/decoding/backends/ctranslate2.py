"""The `ctranslate2` backend: a converted copy of the checkpoint, on CPU (int8 too) or CUDA."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends.base import Backend, Hypothesis, register_backend, with_nbest
from convexlm.decoding.batching import common_head
from convexlm.errors import UserError
from convexlm.positions import positions_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convexlm.decoding.search import Search

INSTALL = "pip install 'convexlm[ctranslate2]'"

ROPE_TYPES = {"default", "linear"}
"""Position angles that it computes as transformers does. Its `llama3` (4.8.5) goes further off with each position."""


@register_backend("ctranslate2")
class CTranslate2Backend(Backend):
    """Greedy and beam search by CTranslate2.

    What it does as transformers does, and what it does otherwise:

    - A beam search ends when `num_beams` hypotheses are finished, which is `early_stopping: true`; others are refused.
    - Where a rule takes a token out, it makes the rest sum to one again. Greedy search does not notice; in a beam
      search `min_new_tokens` would always shift scores and is refused, and the n-gram rule does so in the rare case
      that it strikes.
    - Its n-gram rule sees the answer only, ours prompt and answer. A hypothesis that repeats an n-gram of its prompt
      is therefore searched for again, with those n-grams forbidden one by one.
    - In a batch of prompts of several lengths it counts the tail of the longer ones as generated: only prompts of one
      length are put together.
    - Where a layer attends to the last so many tokens only, it computes something else for longer texts: those are
      refused. (The probe of a conversion is too short to see it.)
    - Position angles of other kinds than `ROPE_TYPES` are refused, for the same reason.
    - Its sampling has a stream for all sentences together, so a sample would depend on the batch; refused.
    """

    compute_types = (
        "float32",
        "float16",
        "bfloat16",
        "int8",
        "int8_float32",
        "int8_float16",
        "int8_bfloat16",
        "int16",
    )

    def check(self, search: Search) -> None:
        """Refuse what CTranslate2 does otherwise."""
        if reason := why_not(search):
            raise UserError(f"the ctranslate2 backend {reason}; or use --backend hf")

    def check_installed(self, device: str | None = None) -> None:  # noqa: ARG002
        """Refuse a missing installation."""
        try:
            import ctranslate2  # noqa: F401
        except ImportError:
            raise UserError(f"the ctranslate2 backend needs a library: {INSTALL}") from None

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        """Convert the checkpoint unless that was done before, and load it with the compute type `dtype`."""
        import ctranslate2
        import torch

        from convexlm.decoding.backends.hf import eos_ids_of
        from convexlm.decoding.checkpoint import checkpoint_sha256
        from convexlm.decoding.ct2_cache import converted
        from convexlm.decoding.generation.rows import rope_types
        from convexlm.decoding.loading import load_config, load_tokenizer

        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda"):
            raise UserError(f"the ctranslate2 backend runs on cpu and cuda, not on {device}; use --backend hf")
        supported = ctranslate2.get_supported_compute_types(kind, int(index or 0))
        if dtype not in supported:
            raise UserError(
                f"CTranslate2 cannot compute in {dtype} on {device}; it can: {', '.join(sorted(supported))}"
            )
        self.tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        config = load_config(checkpoint, trust_remote_code=trust_remote_code)
        if others := rope_types(config) - ROPE_TYPES:
            raise UserError(
                f"CTranslate2 computes position angles of the kind {min(others)} otherwise; use --backend hf"
            )
        self.max_length = positions_of(config)
        window = _attention_window(config)
        if window is not None and window < (self.max_length or window + 1):
            self.max_length = window
            self.beyond = "the {} tokens of an attention window, where CTranslate2 goes wrong; use --backend hf"
        folder = converted(checkpoint, checkpoint_sha256(checkpoint), trust_remote_code=trust_remote_code)
        self.names = _vocabulary(folder)
        # An adapter may have more tokens than its base model, whose config this is.
        self.vocabulary = config.get_text_config().vocab_size = len(self.names)
        self.eos_ids = eos_ids_of(self.tokenizer, checkpoint, config)
        self.model = ctranslate2.Generator(
            str(folder),
            device=kind,
            device_index=int(index or 0),
            compute_type=dtype,
            intra_threads=torch.get_num_threads() if kind == "cpu" else 0,
        )

    def begin(self, prompts: Sequence[list[int]]) -> None:
        """Keep the prompts' shared head: CTranslate2 computes it once and remembers."""
        self.head = common_head(prompts)

    def generate(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis]:
        """The best hypothesis of each prompt, with the model's own log-probabilities."""
        by_length: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(place)
        found: dict[int, list[tuple[list[int], float]]] = {}
        for places in by_length.values():
            group = [prompts[place] for place in places]
            for place, answers in zip(places, self._search(group, search), strict=True):
                found[place] = answers
        if search.no_repeat_ngram_size:
            for place, prompt in enumerate(prompts):
                if any(_repeats(prompt, answer, search.no_repeat_ngram_size) for answer, _ in found[place]):
                    found[place] = self._search_apart(prompt, search)
        return [
            with_nbest([self._hypothesis(prompt, *answer, search) for answer in found[place]], search)
            for place, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """Free the model's memory."""
        super().close()
        self.model = None
        gc.collect()

    def _search(
        self, prompts: Sequence[list[int]], search: Search, forbidden: list[list[str]] | None = None
    ) -> list[list[tuple[list[int], float]]]:
        """(answer, sum of log-probabilities) of each prompt, all of one length, best first."""
        results = self.model.generate_batch(
            [[self.names[token] for token in prompt[len(self.head) :]] for prompt in prompts],
            static_prompt=[self.names[token] for token in self.head] or None,
            beam_size=search.num_beams,
            num_hypotheses=search.num_return_sequences,
            length_penalty=search.length_penalty if search.num_beams > 1 else 0.0,
            no_repeat_ngram_size=search.no_repeat_ngram_size,
            suppress_sequences=forbidden,
            min_length=search.min_new_tokens,
            max_length=search.max_new_tokens,
            end_token=self.eos_ids,
            return_end_token=True,
            include_prompt_in_result=False,
            return_scores=True,
        )
        penalty = search.length_penalty if search.num_beams > 1 else 0.0
        return [
            [
                (list(answer), score * len(answer) ** penalty)
                for answer, score in zip(result.sequences_ids, result.scores, strict=True)
            ]
            for result in results
        ]

    def _search_apart(self, prompt: list[int], search: Search) -> list[tuple[list[int], float]]:
        """Search with the prompt's own n-grams forbidden, which are another prompt's by chance only."""
        size = search.no_repeat_ngram_size
        windows = {tuple(prompt[start : start + size]) for start in range(len(prompt) - size + 1)}
        forbidden = [[self.names[token] for token in window] for window in sorted(windows)]
        (answers,) = self._search([prompt], search, forbidden)
        if any(_repeats(prompt, answer, size) for answer, _ in answers):
            raise UserError(
                "CTranslate2 cannot keep an answer from repeating an n-gram that begins in its prompt; use "
                "--backend hf"
            )
        return answers

    def _hypothesis(self, prompt: list[int], answer: list[int], log_prob: float, search: Search) -> Hypothesis:
        # A step at which a token was taken out has its log-probabilities renormalised.
        if search.min_new_tokens or _struck(prompt, answer, search.no_repeat_ngram_size):
            names = [self.names[token] for token in [*prompt, *answer]]
            (scored,) = self.model.score_batch([names], max_input_length=0)
            log_prob = sum(scored.log_probs[len(prompt) - 1 :])
        return Hypothesis(answer, log_prob, bool(answer) and answer[-1] in self.eos_ids)


def why_not(search: Search) -> str:
    """What of a search CTranslate2 cannot do as asked, and how to ask for what it can; empty if nothing."""
    if search.do_sample:
        return "has one random stream for a whole batch, and none for each sentence, so it is not asked to do_sample"
    if search.num_beams == 1:
        return ""
    if search.early_stopping is not True:
        return (
            "ends a beam search as soon as num_beams hypotheses are finished, and so cannot do early_stopping "
            f"{str(search.early_stopping).lower()}: ask for --early_stopping true"
        )
    if search.min_new_tokens:
        return "scores beams differently with min_new_tokens: leave it out of a beam search"
    if search.num_return_sequences > 1 and search.length_penalty == 0:
        return "may end an n-best search early without a length penalty: ask for a length_penalty other than 0"
    return ""


def _attention_window(config: Any) -> int | None:
    """The fewest last tokens that a layer of the model attends to; None where all attend to all."""
    from transformers import DynamicCache

    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return min(filter(None, windows), default=None)


def _vocabulary(folder: Path) -> list[str]:
    import json

    names = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    if len(set(names)) != len(names):
        raise UserError("CTranslate2 tells tokens apart by name, and this vocabulary has one twice; use --backend hf")
    return names


def _repeats(prompt: list[int], answer: list[int], size: int) -> bool:
    """Whether an n-gram that ends in the answer stands earlier in prompt and answer."""
    both = prompt + answer
    seen = {tuple(both[start : start + size]) for start in range(len(prompt) - size + 1)}
    for end in range(max(size, len(prompt) + 1), len(both) + 1):
        window = tuple(both[end - size : end])
        if window in seen:
            return True
        seen.add(window)
    return False


def _struck(prompt: list[int], answer: list[int], size: int) -> bool:
    """Whether the n-gram rule can have forbidden any token along the answer."""
    if not size:
        return False
    if size == 1:
        return True
    both = prompt + answer
    seen = {tuple(both[start : start + size - 1]) for start in range(len(prompt) - size + 1)}
    for end in range(max(size - 1, len(prompt)), len(both)):
        window = tuple(both[end - size + 1 : end])
        if window in seen:
            return True
        seen.add(window)
    return False
