"""What a tokenizer's chat template makes of messages: the same text on every day, and how it ends an answer."""

from __future__ import annotations

import re
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from convexlm.instructions import Record

TODAY = datetime(2024, 7, 26)
"""The day on which every prompt is written: what Llama 3.2's template says where it is told no date.

Templates such as Llama 3.2's and gpt-oss's write the date into the prompt. With the true one a model would be decoded
with other prompts than it was trained with, and a run that was stopped would go on with others after midnight.
"""


class RefusedMessages(UserError):
    """A chat template refused messages; `number` is the place of the prompt among those encoded."""

    number = 0


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> str:
    """The text of messages, with the generation prompt.

    Raises:
        UserError: the tokenizer has no chat template.
        RefusedMessages: it does not take these messages, or leaves one out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template; use another template, or set its chat_template")
    text = _render(tokenizer, messages, True)
    _refuse_to_leave_out(tokenizer, messages)
    return text


_looked_at: dict[tuple[str, tuple[tuple[str, bool], ...]], int | None] = {}  # which message is left out, if one is


def _refuse_to_leave_out(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> None:
    """See that every message with a text gets into the prompt, by a word in its place; once for each order of roles.

    Many templates pass over a role that they do not know, some the system's, and those of vision models all texts.
    """
    asked = [_has_text(turn) for turn in messages]
    key = (tokenizer.get_chat_template(), tuple(zip((str(turn.get("role")) for turn in messages), asked, strict=True)))
    if key not in _looked_at:
        words = [f"word{number}end" for number in range(len(messages))]
        turns = [
            {**turn, "content": word} if has else turn for turn, word, has in zip(messages, words, asked, strict=True)
        ]
        try:
            text = _render(tokenizer, turns, True)
        except RefusedMessages:  # it looks at what is in them, and takes them as they are
            text = "".join(words)
        lost = (number for number, has in enumerate(asked) if has and words[number] not in text)
        _looked_at[key] = next(lost, None)
    if (number := _looked_at[key]) is not None:
        raise RefusedMessages(
            f"the tokenizer's chat template leaves out message {number + 1}, of the role "
            f"`{messages[number].get('role')}`; put its text into another message, or set another chat_template"
        )


def _has_text(turn: dict[str, Any]) -> bool:
    """Whether a turn has a text that no template may leave out; beside a tool call some do."""
    content = turn.get("content")
    return isinstance(content, str) and bool(content.strip()) and not turn.get("tool_calls")


def end_of_turn(tokenizer: Any) -> str | None:
    """The special token with which the chat template ends an answer; None where there is none, or no template."""
    return around_answer(tokenizer)[1]


def around_answer(tokenizer: Any) -> tuple[str, str | None]:
    """Blanks that the chat template puts between generation prompt and answer, and the special token behind it.

    Llama 2's has a blank before the answer, so that the answer begins with other tokens than without.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", None
    answer, turns = "answer", [{"role": "user", "content": "question"}]
    try:
        asked = _render(tokenizer, turns, True)
        text = _render(tokenizer, [*turns, {"role": "assistant", "content": answer}], False)
    except RefusedMessages:
        return "", None
    before, found, behind = text.rpartition(answer)
    if not found:
        return "", None
    blanks = before.removeprefix(asked)
    behind = behind.lstrip()  # Llama 2 puts a blank before its `</s>`
    end = next((token for token in longest_first(special_texts(tokenizer)) if behind.startswith(token)), None)
    return (blanks if not blanks.strip() else ""), end


def also_ends(generation_config: Any, token: int) -> None:
    """Let generation end at `token` too, wherever the model is used."""
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if token not in ends:
        generation_config.eos_token_id = [*ends, token]


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens as they are written."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""})


def said_of_records(records: Sequence[Record], tokenizer: Any, template: str) -> list[str]:
    """What to tell before records are trained on, for it may not be what is meant."""
    said = [_said_of_special_text(records, tokenizer, template)]
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        said.append(_said_of_open_block(records, tokenizer))
    return [one for one in said if one]


def _said_of_special_text(records: Sequence[Record], tokenizer: Any, template: str) -> str:
    """What to tell of records with special tokens written in them, as prompts rendered elsewhere have; empty if none.

    Messages are not looked at, only the answer: in them it is what one wants.
    """
    tokens = special_texts(tokenizer)
    for record in records:
        text = record.completion if template == "chat" else f"{record.prompt}\0{record.completion}"
        if found := [token for token in tokens if token in text]:
            return (
                f"`{found[0]}` is written in the data ({record.id}) and trained on as text, not as the special token: "
                "give dialogues as `messages` (template chat), and answers without an end mark"
            )
    return ""


def _said_of_open_block(records: Sequence[Record], tokenizer: Any) -> str:
    """What to tell of answers behind a generation prompt that has opened a block (`<think>`); empty if none.

    Qwen3.5's template does, and DeepSeek R1's. An answer that does not close it is learned as a thought.
    """
    try:
        asked = render_chat(tokenizer, records[0].messages or [{"role": "user", "content": records[0].prompt}])
    except RefusedMessages:  # told with the record's name when it is tokenized
        return ""
    opened = re.search(r"<(\w+)>\s*$", asked)
    if opened is None or (close := f"</{opened[1]}>") not in tokenizer.get_chat_template():
        return ""
    record = next((record for record in records if close not in record.completion), None)
    if record is None:
        return ""
    return (
        f"the chat template's prompt ends in `<{opened[1]}>`, and an answer ({record.id}) does not close it, so it is "
        f"trained as what stands inside; write `{close}` into the answers, or set a chat_template that opens none"
    )


def texts_of(value: Any) -> Iterator[str]:
    """All texts in messages, those in a tool call's arguments too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every one of `texts_of` changed."""
    if isinstance(value, dict):
        return {key: with_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def longest_first(texts: Sequence[str]) -> list[str]:
    """Texts in the order in which to look for them, where one may begin with another."""
    return sorted(texts, key=len, reverse=True)


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_on_one_day(template) if "strftime_now" in template else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # jinja2's errors, and whatever a template raises about roles
        raise RefusedMessages(f"the tokenizer's chat template refuses the messages: {error}") from None


@cache
def _on_one_day(template: str) -> str:
    """A chat template whose `strftime_now` tells `TODAY`: transformers lets nothing but a macro take its place."""
    codes = re.findall(r"%-?[a-zA-Z]", template)
    filters = "".join(f"|replace('{code}','{TODAY.strftime(code)}')" for code in dict.fromkeys(codes))
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}" + template
