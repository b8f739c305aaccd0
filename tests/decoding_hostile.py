"""A backend that answers with the worst text there is; worker processes import it by this module's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.decoding.backends import Backend, Hypothesis, register_backend, with_nbest

if TYPE_CHECKING:
    from pathlib import Path

    from convexlm.decoding import Search
    from convexlm.tokenization import PromptSettings

ANSWERS = [
    "### Response: a ### Instruction: b",
    "</s><s> <unk> [PAD]",
    "",
    'quotes " \' ` \\ \\n {"id": "7"}',
    "👩‍👩‍👧 🦙 𝔘𝔫𝔦 \U0010ffff",
    "line\u2028separator\u2029and\x85next\vand\fmore\x1c",
    "NUL \x00 and bell \x07",
    "lone \ud800 surrogates \udcff",
    "שלום \u202eعربى",
    "\ufeffmarked",
    "",
]
QUESTIONS = [
    *("two\nlines", "a\rreturn", "both\r\n", "next\x85line", "line\u2028separator", "paragraph\u2029"),
    *("", " \n ", "NUL\x00", "\ud83d alone", "😀 4 bytes", "שלום", '"quoted"', "### Response:", "</s>", "\t", "\x1c"),
]


@register_backend("hostile")
class HostileBackend(Backend):
    """Answers the prompt of the question at place n with the answer at place n, whatever else is in the batch."""

    def load(self, checkpoint: Path, device: str, dtype: str, *, trust_remote_code: bool = False) -> None:
        """Nothing to load."""

    def encode(self, prompts: Any, settings: PromptSettings) -> list[list[int]]:
        return [[place, *prompt.encode("utf-8", errors="surrogatepass")] for place, prompt in enumerate(prompts)]

    def generate(self, prompts: Any, search: Search) -> list[Hypothesis]:
        return [
            with_nbest([Hypothesis([prompt[0] + more], -1.0 - more, True) for more in range(search.num_beams)], search)
            for prompt in prompts
        ]

    def text(self, hypothesis: Hypothesis) -> str:
        return ANSWERS[hypothesis.token_ids[0] % len(ANSWERS)]
