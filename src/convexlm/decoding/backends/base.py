"""What a decoding backend is, and the registry of backends by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from convexlm.decoding.batching import MAX_SENTENCES, TOKEN_BUDGET
from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from convexlm.decoding.search import Search
    from convexlm.tokenization import PromptSettings

BACKENDS: dict[str, type[Backend]] = {}


@dataclass(frozen=True)
class Hypothesis:
    """What a model generated after a prompt.

    Attributes:
        token_ids: the generated tokens, the EOS that ended them included, no padding.
        log_prob: the sum of the model's own log-probabilities (natural logarithm) of `token_ids` given the prompt,
            before any n-gram or length rule and any temperature; None where a backend cannot tell.
        finished: it ended in an EOS token, rather than being cut at `max_new_tokens`.
        nbest: the best hypotheses of the search, this one first, where `num_return_sequences` asks for more than one;
            of sampling, the samples in the order of their numbers.
    """

    token_ids: list[int]
    log_prob: float | None
    finished: bool
    nbest: tuple[Hypothesis, ...] = ()


def with_nbest(hypotheses: Sequence[Hypothesis], search: Search) -> Hypothesis:
    """The first of hypotheses that are sorted by score, or numbered, with as many in `nbest` as the search returns."""
    best = hypotheses[0]
    if search.num_return_sequences == 1:
        return best
    return replace(best, nbest=tuple(hypotheses[: search.num_return_sequences]))


class Backend(ABC):
    """A loaded model that turns token ids of prompts into hypotheses.

    A subclass sets `tokenizer`, `max_length` and `vocabulary` in `load`, and implements `generate`. It imports
    optional libraries in `load`, so that knowing its name costs nothing.
    """

    name: ClassVar[str] = ""
    starts_processes: ClassVar[bool] = False
    """It has processes of its own, which outlive a killed one: it always runs in a worker, which takes them along."""
    compute_types: ClassVar[tuple[str, ...]] = ()
    """What `--compute_type` may say, in place of a dtype; nothing for most."""
    tokenizer: Any = None
    max_length: int | None = None
    """The most tokens of prompt and answer together that the model has positions for; None: no limit known."""
    beyond: str = "the model's {} positions; shorten the one or the other"
    """What more than `max_length` tokens are more than, and what to do about it."""
    vocabulary: int | None = None
    """Tokens that the model has embeddings for; a tokenizer may know more. None: not known."""

    def check(self, search: Search) -> None:  # noqa: B027 - most backends can do every search
        """Refuse a search that this backend cannot do exactly as asked; called before anything is loaded.

        Raises:
            UserError: naming the option and a backend that can.
        """

    def check_installed(self, device: str | None = None) -> None:  # noqa: B027 - most need nothing more
        """Refuse to begin where an optional library is missing, or cannot use the device.

        Args:
            device: as of `load`; None: not known yet.

        Raises:
            UserError: naming the library and how to install it.
        """

    def check_gpu_memory(self, share: float | None, device: str, num_processes: int) -> None:
        """Refuse a `gpu_memory_utilization` that this backend does not have, or that does not go with the rest.

        Args:
            share: of a GPU's memory, for one process; None: the backend's own.
            device: as of `load`; `cuda`: processes take the GPUs in turn.
            num_processes: on this machine.

        Raises:
            UserError: naming the option.
        """
        if share is not None:
            raise UserError(f"the {self.name} backend has no gpu_memory_utilization; the vllm backend does")

    @abstractmethod
    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        """Load model and tokenizer; a backend with a `gpu_memory_utilization` gets that too, if the user gave it.

        Args:
            checkpoint: a folder that `check_checkpoint` accepts.
            device: a torch device name (`cpu`, `cuda`, `cuda:1`).
            dtype: `float32`, `bfloat16` or `float16`.
            trust_remote_code: let the checkpoint run its own Python code.

        Raises:
            UserError: the checkpoint cannot be loaded.
        """

    def begin(self, prompts: Sequence[list[int]]) -> None:  # noqa: B027 - most backends need not know
        """Hear all prompts of a job before its first batch.

        Those that are done already are among them, so that what is made of them is the same in every run of the job.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[list[int]], search: Search) -> list[Hypothesis]:
        """The best hypothesis of each prompt, in their order; the same whatever else is in the batch.

        With `num_return_sequences` above 1 each has the n best, or n samples, in `nbest`: see `with_nbest`.

        Out of memory is left to the caller: any exception that accelerate's `should_reduce_batch_size` knows makes it
        try again with half of the batch.
        """

    def generate_most(self, prompts: Sequence[list[int]], search: Search) -> Sequence[Hypothesis | None]:
        """As `generate`, but a few sentences that take much longer than the others may be put off (None).

        Those are decoded from the start, together with their like of other batches, once all others are done.
        Which ones depends on the prompts and the search alone.
        """
        return self.generate(prompts, search)

    def held(self, length: int, search: Search) -> int:
        """Tokens whose keys and values are held for a sentence at most, over all its beams or samples.

        Args:
            length: of the prompt.
            search: its beams or samples, and its `max_new_tokens`.
        """
        return (length + search.max_new_tokens) * search.rows

    def room(self) -> tuple[int, int]:
        """How many held tokens and how many sentences a batch may have, unless the user says; asked once loaded."""
        return TOKEN_BUDGET, MAX_SENTENCES

    def encode(self, prompts: Sequence[str], settings: PromptSettings) -> list[list[int]]:
        """The token ids of each prompt, as in training."""
        from convexlm.tokenization import encode_prompts

        return encode_prompts(self.tokenizer, prompts, settings)

    def text(self, hypothesis: Hypothesis) -> str:
        """The hypothesis as one line of text: no special tokens, newlines as spaces, outer blanks removed."""
        from convexlm.tokenization import decode_text

        # What ends it is no text, even where the tokenizer takes that token for an ordinary one.
        return decode_text(self.tokenizer, hypothesis.token_ids[: -1 if hypothesis.finished else None])

    def close(self) -> None:
        """Free the model's memory."""
        self.tokenizer = None


AnyBackend = TypeVar("AnyBackend", bound=type[Backend])


def register_backend(name: str) -> Callable[[AnyBackend], AnyBackend]:
    """Class decorator: make a `Backend` known under `name`."""

    def register(backend: AnyBackend) -> AnyBackend:
        if name in BACKENDS and BACKENDS[name].__qualname__ != backend.__qualname__:
            raise ValueError(f"a decoding backend named {name!r} exists already")
        backend.name = name
        BACKENDS[name] = backend
        return backend

    return register


def get_backend(name: str) -> type[Backend]:
    """The backend class of that name.

    Raises:
        UserError: no such backend; the message lists those there are.
    """
    import importlib
    import pkgutil

    from convexlm.decoding import backends

    # Every module beside this one may define a backend: adding one is adding a file.
    for module in pkgutil.iter_modules(backends.__path__):
        importlib.import_module(f"{backends.__name__}.{module.name}")
    if name not in BACKENDS:
        raise UserError(f"unknown decoding backend `{name}`; known: {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]
