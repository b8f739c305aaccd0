"""The `hf` backend: transformers' models, with our own search loops, or with `generate` where those cannot be had."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends.base import Backend, Hypothesis, register_backend, with_nbest
from convexlm.decoding.patience import Patience
from convexlm.errors import UserError
from convexlm.positions import positions_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from convexlm.decoding.search import Search

LOGITS_AT_ONCE = 1 << 28
"""Logits that a scoring pass holds at most (1 GiB in float32); sentences are taken so few at a time."""


@register_backend("hf")
class HuggingFaceBackend(Backend):
    """Greedy search, beam search and sampling with transformers' models.

    The loops are `convexlm.decoding.generation`'s for every model that they can run, and transformers' `generate` for
    the others; both find the same hypotheses.

    Of the checkpoint's own generation config only the EOS ids are kept (see `eos_ids_of`): its sampling settings must
    not leak into a search that says nothing of them.
    """

    model: Any = None
    eos_ids: list[int]
    pad_id: int
    why_generate: str = ""
    """Why transformers' `generate` is used; empty where our loops are."""
    one_length: bool = False
    """Whether `generate` is given prompts of one length at a time, since padding would change what it finds."""
    by_length: bool = False
    """Whether one length changes another's position angles (Phi-3's longrope), which a short trial does not show."""
    one_prompt: bool = False
    """Whether it is given one prompt at a time, since even others of its length would."""
    prefix: Any = None

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        """Load model and tokenizer; an adapter folder is put on its base model through PEFT."""
        import torch
        from transformers import GenerationConfig

        from convexlm.decoding.generation import angles_by_length, loops_differ, others_show, padding_shows, why_not
        from convexlm.decoding.loading import load_model, load_tokenizer

        self.tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        self.model = load_model(checkpoint, device, getattr(torch, dtype), trust_remote_code=trust_remote_code)
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self.eos_ids = eos_ids_of(self.tokenizer, checkpoint, self.model.config, self.model)
        pad = _as_ids(self.vocabulary, self.tokenizer.pad_token_id, self.model.generation_config.pad_token_id)
        # Padding is masked everywhere, so any id will do where the tokenizer has none of its own.
        self.pad_id = (pad or self.eos_ids or [0])[0]
        # `generate` fills what a config leaves unset from the model's, so the model's must say nothing.
        self.model.generation_config = GenerationConfig()
        self.max_length = positions_of(self.model.config)
        special = {self.pad_id, *self.eos_ids}
        self.why_generate = why_not(self.model) or loops_differ(self.model, special)
        self.by_length = angles_by_length(self.model)
        shows = bool(self.why_generate) and padding_shows(self.model, special, self.pad_id)
        self.one_length = shows or self.by_length
        self.one_prompt = shows and others_show(self.model, special, self.pad_id)
        if self.why_generate:
            _say_slow(self.model.config.model_type, self.why_generate, self.one_prompt)

    def begin(self, prompts: Sequence[list[int]]) -> None:
        """Compute the keys and values of the prompts' shared head."""
        import torch

        from convexlm.decoding.generation import Prefix

        if not self.why_generate:
            with torch.inference_mode():
                self.prefix = Prefix(self.model, prompts)

    def generate(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis]:
        """The best hypothesis of each prompt, with the model's own log-probabilities."""
        return [hypothesis for hypothesis in self._search(prompts, search) if hypothesis is not None]

    def generate_most(self, prompts: Sequence[list[int]], search: Search) -> Sequence[Hypothesis | None]:
        """As `generate`; by our loops, without the last few where these take more than twice as long as the others."""
        return self._search(prompts, search, Patience(len(prompts), search.max_new_tokens))

    def held(self, length: int, search: Search) -> int:
        """In our loops the beams of a prompt share its keys and values; samples do not."""
        if self.why_generate or search.do_sample:
            return super().held(length, search)
        return length + search.max_new_tokens * search.num_beams

    def room(self) -> tuple[int, int]:
        """On a GPU what fits its memory: a step takes nearly as long for few sentences as for hundreds."""
        import torch

        from convexlm.decoding.batching import MAX_SENTENCES_ON_GPU, tokens_that_fit

        a_token = cached_bytes(self.model)
        if self.model.device.type != "cuda" or a_token is None:
            return super().room()
        memory = torch.cuda.get_device_properties(self.model.device).total_memory
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return tokens_that_fit(memory, weights, a_token), MAX_SENTENCES_ON_GPU

    def _search(
        self, prompts: Sequence[list[int]], search: Search, patience: Patience | None = None
    ) -> list[Hypothesis | None]:
        import torch

        from convexlm.decoding.generation import beam_search, greedy_search, sample

        if self.one_prompt and search.rows > 1:
            raise UserError(
                "what this model finds for a prompt depends on what is beside it in a batch, and beams and samples "
                "are beside each other; give num_beams 1 and num_return_sequences 1"
            )
        with torch.inference_mode():
            if self.why_generate:
                return self._in_groups(prompts, search)
            common = (self.eos_ids, self.pad_id, self.prefix, patience)
            if search.num_beams == 1 and not search.do_sample:
                return greedy_search(self.model, prompts, search, *common)
            several = sample if search.do_sample else beam_search
            found = several(self.model, prompts, search, *common)
            return [None if best is None else with_nbest(best, search) for best in found]

    def close(self) -> None:
        """Free the model's memory, on the device too."""
        from accelerate.utils import release_memory

        super().close()
        self.prefix = None
        self.model = release_memory(self.model)[0]  # collects garbage too

    def _in_groups(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis | None]:
        """By `generate`: all at once, or by length where padding shows, or one by one where other prompts do."""
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            key = place if self.one_prompt else len(prompt) if self.one_length else 0
            groups.setdefault(key, []).append(place)
        found: list[Hypothesis | None] = [None] * len(prompts)
        for places in groups.values():
            hypotheses = self._by_transformers([prompts[place] for place in places], search)
            for place, hypothesis in zip(places, hypotheses, strict=True):
                found[place] = hypothesis
        return found

    def _by_transformers(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis]:
        """By `generate`, and log-probabilities from a separate scoring pass."""
        import torch
        from transformers import LogitsProcessorList

        from convexlm.decoding.generation.draws import Draws
        from convexlm.decoding.ngrams import NoRepeatNgrams

        count = search.num_return_sequences
        asked = [prompt for prompt in prompts for _ in range(count)]
        if search.do_sample:
            prompts = asked
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = search.to_generation_config(eos_token_id=self.eos_ids or None, pad_token_id=self.pad_id)
        processors = LogitsProcessorList()
        if search.no_repeat_ngram_size:
            # Ours does not take padding for text, as transformers' does, so a batch's other prompts change nothing.
            config.no_repeat_ngram_size = None
            processors.append(NoRepeatNgrams(search.no_repeat_ngram_size, mask, search.num_beams))
        if search.do_sample:
            processors.append(Draws(search, prompts, width))
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            logits_processor=processors,
        )
        answers = [self._trim(row) for row in output[:, width:].tolist()]
        del output
        log_probs = self._score(asked, answers)
        eos = set(self.eos_ids)
        hypotheses = [
            Hypothesis(answer, log_prob, bool(answer) and answer[-1] in eos)
            for answer, log_prob in zip(answers, log_probs, strict=True)
        ]
        return [with_nbest(hypotheses[start : start + count], search) for start in range(0, len(hypotheses), count)]

    def _trim(self, row: list[int]) -> list[int]:
        """Cut what `generate` filled in after the first EOS."""
        for position, token in enumerate(row):
            if token in self.eos_ids:
                return row[: position + 1]
        return row

    def _score(self, prompts: Sequence[list[int]], answers: list[list[int]]) -> list[float]:
        """The sum of log-probabilities of each answer given its prompt.

        One teacher-forced pass. The scores that a search returns have its n-gram rule and its length penalty in them,
        and those of all its steps would have to be held; this costs about as much as one prompt.
        """
        scores: list[float] = []
        vocabulary = self.model.config.get_text_config().vocab_size
        start = 0
        while start < len(prompts):
            rows, longest, shortest = 0, 0, len(prompts[start])
            for prompt, answer in zip(prompts[start:], answers[start:], strict=True):
                longest = max(longest, len(prompt) + len(answer))
                shortest = min(shortest, len(prompt))
                if rows and (self.by_length or (rows + 1) * (longest - shortest + 1) * vocabulary > LOGITS_AT_ONCE):
                    break
                rows += 1
            scores += self._score_rows(prompts[start : start + rows], answers[start : start + rows])
            start += rows
        return scores

    def _score_rows(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        import torch

        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        # Padded on the right: under causal attention nothing sees it, and positions need no shift.
        device = self.model.device
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        kept = width - min(map(len, prompts)) + 1
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        first = width - logits.shape[1]  # a model that does not know `logits_to_keep` gives all
        scores = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            begin = len(prompt) - 1 - first
            own = logits[row, begin : begin + len(answer)].float()
            scores.append(_sum_log_probs(own, ids[row, len(prompt) : len(prompt) + len(answer)]))
        return scores


@cache
def _say_slow(kind: str, why: str, alone: bool) -> None:
    """Tell, once a process, why decoding with a model is slower than it might be."""
    from convexlm.progress import note  # it loads transformers, which a mistake need not wait for

    note(f"  {kind}: decoded by transformers' `generate`, which is slower than our loops, for {why}")
    if alone:
        note(f"  {kind}: other prompts in a batch change what is found for one, so prompts are decoded one at a time")


def _sum_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Sum of log-softmax at the tokens: logits (T, V) float32, tokens (T,); added up in float64."""
    chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)
    return float(chosen.double().sum())


def cached_bytes(model: Any) -> int | None:
    """Bytes of the keys and values of one token in all layers, by the model's config; None where it does not tell."""
    config = model.config.get_text_config()
    heads, hidden, layers = (
        getattr(config, name, None) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    if not (heads and hidden and layers):
        return None
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or hidden // heads
    return 2 * int(layers) * int(groups) * int(size) * int(model.dtype.itemsize)


def eos_ids_of(tokenizer: Any, checkpoint: Path, config: Any, model: Any = None) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, its chat template's end of a turn, the generation config's.

    Args:
        tokenizer: the checkpoint's.
        checkpoint: the folder; its files are read if there is no `model`.
        config: the model's; a token that it has no embedding for ends nothing.
        model: the loaded model, whose generation config transformers has read already.
    """
    from convexlm.chat_templates import end_of_turn

    if model is None:
        from convexlm.decoding.loading import load_generation_config

        generation_config = load_generation_config(checkpoint)
    else:
        generation_config = model.generation_config
    turn = end_of_turn(tokenizer)
    ends = None if turn is None else tokenizer.convert_tokens_to_ids(turn)
    return _as_ids(config.get_text_config().vocab_size, tokenizer.eos_token_id, generation_config.eos_token_id, ends)


def _as_ids(vocabulary: int, *values: int | list[int] | None) -> list[int]:
    """All ids of some settings that may each be unset, one id or a list, each id once.

    Without those that the model has no embedding for: a [PAD] that a tokenizer was given, or a -1 for none.
    """
    ids: list[int] = []
    for value in values:
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [token for token in ids if not isinstance(token, int)]:
        raise UserError(f"the generation config names a token by {wrong[0]!r}, which is no number")
    return [token for token in dict.fromkeys(ids) if 0 <= token < vocabulary]
