"""How a hypothesis is searched for: greedy or beam search, with the option names of transformers."""

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


@dataclass(frozen=True)
class Search:
    """The settings of one search. One beam is greedy search; there is no sampling.

    Args:
        num_beams: beams kept at each step; 1 is greedy search.
        no_repeat_ngram_size: no n-gram of this many tokens occurs twice in prompt and answer together; 0 allows all.
        max_new_tokens: an answer longer than this many tokens is cut.
        min_new_tokens: EOS is not taken before this many tokens.
        length_penalty: a beam's log-probability is divided by its number of generated tokens to this power; without
            effect on greedy search.
        early_stopping: when a beam search ends, as in transformers: False (a heuristic), True (as soon as
            `num_beams` hypotheses are finished) or "never" (only when none can get better).
        num_return_sequences: so many of a beam search's best hypotheses are kept in the records; at most `num_beams`.
            The first is the hypothesis, whatever their number.
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
    label: str | None = None

    def __post_init__(self) -> None:
        least = {
            **{"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 1},
            **{"min_new_tokens": 0, "num_return_sequences": 1},
        }
        for name in least:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise UserError(f"{name} must be a whole number, at least {least[name]}, not {value!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})"
            )
        if self.num_return_sequences > self.num_beams:
            raise UserError(
                f"num_return_sequences ({self.num_return_sequences}) is more than num_beams ({self.num_beams}): a "
                "search has no more hypotheses than beams"
            )
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not math.isfinite(penalty):
            raise UserError(f"length_penalty must be a finite number, not {penalty!r}")
        # YAML gives `1`, the command line `1.0`: the same search, so the same settings and hash.
        object.__setattr__(self, "length_penalty", float(penalty))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UserError(f"early_stopping must be true, false or never, not {self.early_stopping!r}")
        if self.label is not None and not (isinstance(self.label, str) and _LABEL.fullmatch(self.label)):
            raise UserError(f"a search's label is made of letters, digits, `-` and `_`, not {self.label!r}")

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
        """The label if there is one, else `greedy` or `beamN`."""
        return self.label or ("greedy" if self.num_beams == 1 else f"beam{self.num_beams}")

    def settings(self) -> dict[str, Any]:
        """Everything that can change a record: all options but the label (n-best only where asked for)."""
        options = asdict(self)
        del options["label"]
        if self.num_return_sequences == 1:
            del options["num_return_sequences"]
        return options

    def to_generation_config(self, **token_ids: Any) -> GenerationConfig:
        """The search for transformers' `generate`; `token_ids` are `eos_token_id` and `pad_token_id`."""
        from transformers import GenerationConfig

        # Options that only beam search reads are left out of greedy search, where transformers would warn of them.
        beam = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        return GenerationConfig(
            do_sample=False,
            num_beams=self.num_beams,
            num_return_sequences=self.num_return_sequences,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            no_repeat_ngram_size=self.no_repeat_ngram_size or None,
            use_cache=True,
            **(beam if self.num_beams > 1 else {}),
            **token_ids,
        )
