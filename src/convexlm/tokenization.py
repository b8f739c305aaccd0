r"""Prompts and answers <-> token ids, the same in training and in decoding.

A row is `[BOS] prompt | answer EOS`; labels cover the answer and its EOS. The two sides of `|` are tokenized apart, so
no token spans them and what decoding feeds the model (`encode_prompt`) is exactly the head of the training row. Text
from the user is text: a literal `</s>` or `<|im_end|>` in it becomes ordinary pieces, never the special token.

With the template `chat` the tokenizer's chat template is put around the messages. Its own special tokens are special,
those written in a message are text. The answer follows the generation prompt and ends in the special token with
which the chat template ends it (Gemma's `<end_of_turn>`), or in the EOS where it has none. What else the template
would write around the answer (Qwen3's empty `<think>` block, a line end at the very end) is left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.chat_templates import (
    RefusedMessages,
    around_answer,
    end_of_turn,
    longest_first,
    render_chat,
    special_texts,
    texts_of,
    with_texts,
)
from convexlm.errors import UserError
from convexlm.files import read_json_object, write_atomic
from convexlm.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from convexlm.instructions import Record

    Prompt = str | Sequence[Mapping[str, Any]]

__all__ = [
    "SETTINGS_FILE",
    "PromptSettings",
    "TokenizedRecords",
    "answer_end",
    "build_dataset",
    "check_max_length",
    "decode_text",
    "encode_continuations",
    "encode_prompt",
    "encode_prompts",
    "encode_record",
    "load_tokenizer",
    "nothing_left",
    "tokenize_batch",
    "tokenize_records",
]

SETTINGS_FILE = "convexlm.json"
"""The file in a checkpoint folder that says how its prompts are made."""

_BATCH = 1000


@dataclass(frozen=True)
class PromptSettings:
    """How prompts become ids; kept in the checkpoint so that decoding does what training did.

    Attributes:
        template: the name of the prompt template.
        add_bos: put the BOS token before the prompt; None until `resolve` fixes it for a tokenizer.
    """

    template: str = "alpaca"
    add_bos: bool | None = None

    def resolve(self, tokenizer: Any) -> PromptSettings:
        """These settings with `add_bos` fixed.

        None becomes True if the tokenizer puts a BOS before a text of its own accord, or has one that is not its EOS
        too (as it is in GPT-2, which was trained without one) and is not told `add_bos_token: false`; and False with
        the template `chat`, where the chat template says whether there is one.

        Raises:
            UserError: `add_bos` is True and the tokenizer has no BOS token.
        """
        bos = tokenizer.bos_token_id
        if self.add_bos is None:
            if bos is None or self.template == "chat":
                return replace(self, add_bos=False)
            # What it does counts before what it says; a bare SentencePiece model does nothing and says nothing.
            puts_one = tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
            may = bos != tokenizer.eos_token_id and tokenizer.init_kwargs.get("add_bos_token") is not False
            return replace(self, add_bos=puts_one or may)
        if self.add_bos and bos is None:
            raise UserError("add_bos is on, but the tokenizer has no BOS token; turn add_bos off")
        return self

    def save(self, folder: str | Path) -> None:
        """Write the settings into the folder's `convexlm.json`; its other keys stay.

        Raises:
            UserError: there is such a file and it is no JSON object.
        """
        path = Path(folder) / SETTINGS_FILE
        content = read_json_object(path) if path.exists() else {}
        content["prompt"] = {"template": self.template, "add_bos": self.add_bos}
        write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> PromptSettings:
        """Read the settings of a checkpoint folder.

        Raises:
            UserError: there are none, or they are malformed.
        """
        path = Path(folder) / SETTINGS_FILE
        prompt = read_json_object(path).get("prompt")
        if not isinstance(prompt, dict):
            raise UserError(f"{path}: expected a key `prompt` with an object that has `template` and `add_bos`")
        unknown = ", ".join(sorted(set(prompt) - {"template", "add_bos"}))
        if unknown:
            raise UserError(f"{path}: unknown prompt setting {unknown}; known: template, add_bos")
        settings = cls(prompt.get("template", cls.template), prompt.get("add_bos"))
        if not isinstance(settings.template, str) or not isinstance(settings.add_bos, (bool, type(None))):
            raise UserError(f"{path}: `template` must be a name and `add_bos` true, false or null")
        return settings


def encode_prompt(tokenizer: Any, prompt_text: Prompt, settings: PromptSettings) -> list[int]:
    """The ids that come before the answer, in training and in decoding.

    Args:
        tokenizer: any tokenizer of transformers.
        prompt_text: the filled prompt. With the template `chat`: the user's turn, or the list of all messages.
        settings: resolved or not.

    Raises:
        UserError: the template is `chat` and the tokenizer has no chat template or it refuses the messages.
    """
    return encode_prompts(tokenizer, [prompt_text], settings)[0]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], settings: PromptSettings) -> list[list[int]]:
    """`encode_prompt` for many prompts at once, which is many times faster."""
    settings = settings.resolve(tokenizer)
    if settings.template == "chat":
        encoded = []
        for number, prompt in enumerate(prompts):
            try:
                encoded.append(_encode_chat(tokenizer, prompt))
            except RefusedMessages as error:
                error.number = number
                raise
    elif all(isinstance(prompt, str) for prompt in prompts):
        encoded = _encode_texts(tokenizer, prompts)
    else:
        raise UserError(f"prompts of messages need the template `chat`, not `{settings.template}`")
    if settings.add_bos:
        bos = tokenizer.bos_token_id
        # Only a chat template can have put one there: from text no special token is made.
        has_own = settings.template == "chat"
        encoded = [ids if has_own and ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    return encoded


def encode_record(tokenizer: Any, record: Record, settings: PromptSettings) -> tuple[list[int], list[int]]:
    """Prompt ids, and the answer's ids with `answer_end`, of one record.

    Raises:
        UserError: the tokenizer has no EOS token, or as `encode_prompt`.
    """
    prompt = encode_prompt(tokenizer, _prompt_of(record), settings)
    return prompt, _encode_answers(tokenizer, [record], settings)[0]


def answer_end(tokenizer: Any, settings: PromptSettings) -> int:
    """The token that ends an answer: the EOS, or with the template `chat` what the chat template ends it with.

    Gemma and Phi-3 never end a turn with their EOS: trained to, they would unlearn what they know.

    Raises:
        UserError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so no answer could end; set its eos_token")
    end = end_of_turn(tokenizer) if settings.template == "chat" else None
    return tokenizer.eos_token_id if end is None else tokenizer.convert_tokens_to_ids(end)


def encode_continuations(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    r"""The ids of texts that go on after other text, without special tokens.

    A SentencePiece tokenizer such as Llama's puts a blank before whatever it encodes. Where the tokenizer does (found
    by trying, whatever its class), the text is encoded behind a short anchor whose ids are then dropped.
    """
    first, second = _encode_texts(tokenizer, ["a", "b"])
    pending = list(range(len(texts)))
    result: list[list[int]] = [[] for _ in texts]
    if _decode(tokenizer, first + second) != "ab":
        for anchor in ("\n", "\x02", ":", "a"):
            head = _encode_texts(tokenizer, [anchor])[0]
            if not head or tokenizer.unk_token_id in head:
                continue  # taken for a blank, as XGLM's tokenizer does, or unknown, as with the text behind it
            encoded = _encode_texts(tokenizer, [anchor + texts[index] for index in pending])
            fused = []
            for index, ids in zip(pending, encoded, strict=True):
                if ids[: len(head)] == head:
                    result[index] = ids[len(head) :]
                else:
                    fused.append(index)  # the text's first character joined the anchor in one piece
            pending = fused
            if not pending:
                return result
    for index, ids in zip(pending, _encode_texts(tokenizer, [texts[index] for index in pending]), strict=True):
        result[index] = ids
    return result


@dataclass
class TokenizedRecords:
    """Rows to train on, and what did not fit.

    Attributes:
        rows: `input_ids`, `labels` (-100 on the prompt), `weight` and `record_id` of each record, in order.
        dropped: ids of the records whose prompt alone fills `max_length`.
        truncated: how many rows lost the end of their answer, and its EOS, to `max_length`.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    truncated: int = 0


def tokenize_records(
    records: Sequence[Record], tokenizer: Any, settings: PromptSettings, max_length: int | None
) -> TokenizedRecords:
    """Turn records into rows of ids and labels, at most `max_length` tokens each (None: no limit).

    A record that is too long loses the end of its answer. One with no room for any target token is dropped and named,
    so every row has a target.

    Raises:
        UserError: no records, none left, no EOS token, `max_length` below 1, or as `encode_prompt`.
    """
    check_max_length(max_length)
    if not records:
        raise UserError("there are no records to tokenize")
    settings = settings.resolve(tokenizer)
    done = TokenizedRecords()
    for start in range(0, len(records), _BATCH):
        part = tokenize_batch(records[start : start + _BATCH], tokenizer, settings, max_length, start)
        done.rows += part.rows
        done.dropped += part.dropped
        done.truncated += part.truncated
    if not done.rows:
        raise nothing_left(done.dropped, len(records), max_length)
    return done


def tokenize_batch(
    records: Sequence[Record], tokenizer: Any, settings: PromptSettings, max_length: int | None, start: int = 0
) -> TokenizedRecords:
    """`tokenize_records` for some of them, of which the first is number `start` (from 0); all may be dropped.

    Raises:
        UserError: no EOS token, an empty prompt without BOS, or as `encode_prompt`.
    """
    answers = _encode_answers(tokenizer, records, settings)
    names = [record.id or f"#{number}" for number, record in enumerate(records, start=start + 1)]
    try:
        prompts = encode_prompts(tokenizer, [_prompt_of(record) for record in records], settings)
    except RefusedMessages as error:
        raise UserError(f"record {names[error.number]}: {error}") from None
    done = TokenizedRecords()
    for number, record in enumerate(records):
        prompt, ids = prompts[number], [*prompts[number], *answers[number]]
        name = names[number]
        if not prompt:
            raise UserError(f"record {name}: the prompt is empty and there is no BOS to start from; set add_bos")
        if max_length is not None and len(prompt) >= max_length:
            done.dropped.append(name)
            continue
        done.truncated += max_length is not None and len(ids) > max_length
        ids = ids[:max_length]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        done.rows.append({"input_ids": ids, "labels": labels, "weight": record.weight, "record_id": name})
    return done


def check_max_length(max_length: int | None) -> None:
    """Refuse a limit that no row could keep.

    Raises:
        UserError: it is below 1.
    """
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length must be at least 1, found {max_length}")


def nothing_left(dropped: Sequence[str], count: int, max_length: int | None) -> UserError:
    """What to raise where all `count` records were dropped; `dropped` names the first of them."""
    named = ", ".join(dropped[:3]) + (", ..." if count > 3 else "")
    return UserError(f"max_length {max_length} is filled by the prompt in all {count} records ({named})")


def build_dataset(tokenized: TokenizedRecords) -> Any:
    """The rows as a `datasets.Dataset` with the columns `input_ids`, `labels`, `weight` and `record_id`."""
    import datasets

    columns = {key: [row[key] for row in tokenized.rows] for key in ("input_ids", "labels", "weight", "record_id")}
    return datasets.Dataset.from_dict(columns)


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids on one line.

    Special tokens are left out, every run of line ends becomes one blank and outer blanks are stripped; all else is
    the model's text as it is.
    """
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return re.sub(r"[\r\n]+", " ", text).strip()


def _encode_answers(tokenizer: Any, records: Sequence[Record], settings: PromptSettings) -> list[list[int]]:
    """The ids of each answer, with the blanks that the chat template puts before it, and its end."""
    blanks = around_answer(tokenizer)[0] if settings.template == "chat" else ""
    end = answer_end(tokenizer, settings)
    return [[*ids, end] for ids in encode_continuations(tokenizer, [blanks + record.completion for record in records])]


def _prompt_of(record: Record) -> Prompt:
    return record.prompt if record.messages is None else record.messages


def _encode_texts(tokenizer: Any, texts: Sequence[Any], *, text_only: bool = True) -> list[list[int]]:
    """Ids without added special tokens; with `text_only`, special tokens written in the text are text."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=text_only,
        return_attention_mask=False,
        return_token_type_ids=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _encode_chat(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of the chat template's rendering, with its generation prompt.

    Without special tokens in the messages these are the ids that `apply_chat_template` gives. Otherwise each of them
    is masked while the template renders, so that the special tokens of the template are known from the user's.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    specials = special_texts(tokenizer)
    written = "\0".join(texts_of(messages))
    if not any(token in written for token in specials):
        return _encode_texts(tokenizer, [render_chat(tokenizer, messages)], text_only=False)[0]
    special = re.compile("|".join(map(re.escape, longest_first(specials))))
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in written)
    messages = with_texts(
        messages, lambda text: special.sub(lambda found: f"{mark}{specials.index(found[0])}{mark}", text)
    )
    ids: list[int] = []
    own = ""  # what the template wrote since the last text with a mask, from a special token to a special token
    for piece in re.split(f"({special.pattern})", render_chat(tokenizer, messages)):
        if mark not in piece:
            own += piece
            continue
        ids += _encode_texts(tokenizer, [own], text_only=False)[0]
        own = ""
        text = re.sub(f"{mark}([0-9]+){mark}", lambda found: specials[int(found[1])], piece)
        last = tokenizer.added_tokens_decoder.get(ids[-1]) if ids else None
        if last is not None and last.rstrip:  # Phi-3's tokens swallow the blanks behind them
            text = text.lstrip()
        goes_on = bool(ids) and not _begins_anew(tokenizer, ids[-1])
        ids += (encode_continuations if goes_on else _encode_texts)(tokenizer, [text])[0]
    return ids + _encode_texts(tokenizer, [own], text_only=False)[0]


def _begins_anew(tokenizer: Any, special: int) -> bool:
    """Whether text behind a special token gets the blank that a SentencePiece tokenizer puts before a text."""
    behind = _encode_texts(tokenizer, [tokenizer.convert_ids_to_tokens(special) + "a"], text_only=False)[0]
    return behind[1:] == _encode_texts(tokenizer, ["a"])[0]
