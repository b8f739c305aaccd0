"""How a hypothesis is found: greedy search, beam search or sampling, with the option names of transformers."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import GenerationConfig

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MOST_LOG = 80.0  # float32 ends at exp(88), and a sum of log-probabilities is multiplied by it, or divided
_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
"""Options of sampling alone, with their defaults."""


@dataclass(frozen=True)
class Search:
    """The settings of one search: greedy (one beam), beam search, or sampling.

    Args:
        num_beams: beams kept at each step; 1 is greedy search.
        no_repeat_ngram_size: no n-gram of this many tokens occurs twice in prompt and answer together; 0 allows all.
        max_new_tokens: an answer longer than this many tokens is cut.
        min_new_tokens: EOS is not taken before this many tokens.
        length_penalty: a beam's log-probability is divided by its number of generated tokens to this power; without
            effect on greedy search.
        early_stopping: when a beam search ends, as in transformers: False (a heuristic), True (as soon as
            `num_beams` hypotheses are finished) or "never" (only when none can get better).
        num_return_sequences: so many of a beam search's best hypotheses are kept in the records, at most `num_beams`;
            or so many samples. The first is the hypothesis, whatever their number.
        do_sample: draw every token from the model's probabilities, after the rules above. The four options below
            are for sampling only, and are None without it.
        temperature: the logits are divided by it, above 0; by default 1.
        top_k: only the so many most probable tokens can be drawn; by default 0, which is all.
        top_p: only the most probable tokens that together have this probability can be drawn; by default 1.
        seed: with the prompt and the number of the sample, what the draws follow from; by default 0.
        label: the search's name in file names and tables, where two searches would else have the same.

    Raises:
        UserError: a value out of its range.
    """

    num_beams: int = 1
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        least = {
            **{"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 1},
            **{"min_new_tokens": 0, "num_return_sequences": 1},
        }
        for name, bound in least.items():
            _check_whole(name, getattr(self, name), bound)
            if getattr(self, name) >= 2**31:  # a count in libraries written in C
                raise UserError(f"{name} must be below 2147483648, not {getattr(self, name)}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})"
            )
        self._check_sampling()
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            raise UserError(
                f"num_return_sequences ({self.num_return_sequences}) is more than num_beams ({self.num_beams}): a "
                "search has no more hypotheses than beams"
            )
        if not _is_finite(self.length_penalty):
            raise UserError(f"length_penalty must be a finite number, not {self.length_penalty!r}")
        if abs(self.length_penalty) * math.log(max(self.max_new_tokens, 2)) > _MOST_LOG:
            raise UserError(
                f"length_penalty {self.length_penalty!r} is too large: {self.max_new_tokens} tokens to that power are "
                "no float32 number"
            )
        # YAML gives `1`, the command line `1.0`: the same search, so the same settings and hash.
        object.__setattr__(self, "length_penalty", float(self.length_penalty))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UserError(f"early_stopping must be true, false or never, not {self.early_stopping!r}")
        if self.label is not None and not (isinstance(self.label, str) and _LABEL.fullmatch(self.label)):
            raise UserError(f"a search's label is made of letters, digits, `-` and `_`, not {self.label!r}")

    def _check_sampling(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise UserError(f"do_sample must be true or false, not {self.do_sample!r}")
        if not self.do_sample:
            if given := [name for name in _SAMPLING if getattr(self, name) is not None]:
                raise UserError(f"{given[0]} is for sampling: give do_sample too, or leave it out")
            return
        if self.num_beams > 1:
            raise UserError(f"do_sample draws token by token, without beams: leave out num_beams {self.num_beams}")
        for name, default in _SAMPLING.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        assert self.temperature is not None and self.top_p is not None
        if not _is_finite(self.temperature) or self.temperature <= 0:
            raise UserError(
                f"temperature must be above 0, not {self.temperature!r} (the limit at 0 is greedy search: leave out "
                "do_sample)"
            )
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        _check_whole("top_k", self.top_k, 0)
        _check_whole("seed", self.seed, 0)
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Search:
        """A search from a recipe's entry.

        Raises:
            UserError: an unknown option or a bad value.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UserError(f"unknown search option `{name}`; known: {', '.join(known)}")
        return cls(**options)

    @property
    def name(self) -> str:
        """The label if there is one, else `greedy`, `beamN`, or `sample` with what is not by default."""
        if self.label:
            return self.label
        if not self.do_sample:
            return "greedy" if self.num_beams == 1 else f"beam{self.num_beams}"
        return "sample" + "".join(
            f"-{letter}{getattr(self, name):g}"
            for name, letter in (("temperature", "t"), ("top_k", "k"), ("top_p", "p"), ("seed", "s"))
            if getattr(self, name) != _SAMPLING[name]
        )

    @property
    def rows(self) -> int:
        """Answers that grow at once for each prompt: beams, or samples."""
        return self.num_return_sequences if self.do_sample else self.num_beams

    def settings(self) -> dict[str, Any]:
        """Everything that can change a record: all options but the label (n-best and sampling only if asked for)."""
        options = asdict(self)
        del options["label"]
        if not self.do_sample:
            for name in ("do_sample", *_SAMPLING):
                del options[name]
        if self.num_return_sequences == 1:
            del options["num_return_sequences"]
        return options

    def to_generation_config(self, **token_ids: Any) -> GenerationConfig:
        """The search for transformers' `generate`; `token_ids` are `eos_token_id` and `pad_token_id`.

        Sampling is not in it: `convexlm.decoding.generation.sampling` draws.
        """
        from transformers import GenerationConfig

        # Options that only beam search reads are left out of greedy search, where transformers would warn of them.
        beam = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        return GenerationConfig(
            do_sample=False,
            num_beams=self.num_beams,
            num_return_sequences=1 if self.do_sample else self.num_return_sequences,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            no_repeat_ngram_size=self.no_repeat_ngram_size or None,
            use_cache=True,
            **(beam if self.num_beams > 1 else {}),
            **token_ids,
        )


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number, at least {least}, not {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
