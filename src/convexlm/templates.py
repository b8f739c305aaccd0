r"""Prompt templates by name, and the translation instruction with its language names.

A template turns the fields of a record (`instruction`, `input`, ...) into the text that the model sees before the
answer. The wording of the built-in ones is a fact of the format: models trained with the reference code or on
Alpaca data expect it to the byte. A new template is one call::

    register_template("qa", "Question: {instruction}\nContext: {context}\nAnswer:")

or, where the text depends on the fields, a function under `@register_template("qa")` that takes the fields. A text
with `{field}` marks, and `\n` for a line end, stands for itself wherever a name is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """A named way to write a prompt; made by `register_template`, looked up with `get_template`.

    Attributes:
        name: what recipes and options call it.
        render: from the fields to the prompt.
    """

    name: str
    render: Callable[[Mapping[str, str]], str]

    def fill(self, fields: Mapping[str, str]) -> str:
        """The prompt for `fields`, each put in as it is: braces inside a field are text.

        Raises:
            UserError: a field that the template uses is missing or is no text.
        """
        try:
            return self.render(fields)
        except _FieldError as error:
            raise UserError(f"template `{self.name}` {error}") from None
        except KeyError as error:  # a user's function that asks for a field that is not there
            raise UserError(f"template `{self.name}` needs the field `{error.args[0]}`") from None

    def may_have_made(self, prompt: str) -> bool:
        """Whether the prompt is of the template's form; True also where a user's function hides what that is."""
        for empty in ((), ("input",)):
            try:
                form = self.render(_AnyField(empty))
            except Exception:  # of a function that cannot do with marks
                return True
            if re.fullmatch(".*".join(map(re.escape, form.split(_MARK))), prompt, re.DOTALL):
                return True
        return False


_MARK = "\ue000"  # for private use, so that no template has it


class _AnyField(dict[str, str]):
    """Has every field: a mark, or nothing in those that are to be empty."""

    def __init__(self, empty: Collection[str]) -> None:
        super().__init__()
        self.empty = empty

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> str:
        return "" if key in self.empty else _MARK

    def get(self, key: str, default: object = None) -> str:
        return self[key]


class _FieldError(Exception):
    """A field that cannot be filled in; `Template.fill` adds the template's name."""


TEMPLATES: dict[str, Template] = {}
"""Every known template by name."""


@overload
def register_template(name: str, text: str, *, replace: bool = False) -> Template: ...
@overload
def register_template(
    name: str, text: None = None, *, replace: bool = False
) -> Callable[[Callable[[Mapping[str, str]], str]], Callable[[Mapping[str, str]], str]]: ...
def register_template(
    name: str, text: str | None = None, *, replace: bool = False
) -> Template | Callable[[Callable[[Mapping[str, str]], str]], Callable[[Mapping[str, str]], str]]:
    """Add a template: from a text with `{field}` marks, or as a decorator of a function from fields to prompt.

    Only `{word}` is a mark; any other brace in `text` stays as it is.

    Args:
        name: its name.
        text: the template's text; without it, a decorator is returned.
        replace: take the place of a template of that name.

    Raises:
        ValueError: the name is taken.
    """
    if name in TEMPLATES and not replace:
        raise ValueError(f"a template `{name}` exists already; pass replace=True to replace it")
    if text is not None:
        return _put(Template(name, lambda fields: fill_text(text, fields)))

    def decorate(function: Callable[[Mapping[str, str]], str]) -> Callable[[Mapping[str, str]], str]:
        _put(Template(name, function))
        return function

    return decorate


def _put(template: Template) -> Template:
    TEMPLATES[template.name] = template
    return template


def fill_text(text: str, fields: Mapping[str, str]) -> str:
    """`text` with every `{field}` replaced, in one pass: what is put in is not searched for marks again."""

    def value(match: re.Match[str]) -> str:
        field = match[1]
        if field not in fields:
            raise _FieldError(f"needs the field `{field}`; there are: {', '.join(map(str, fields)) or 'none'}")
        found = fields[field]
        if not isinstance(found, str):
            raise _FieldError(f"needs the field `{field}` as text, found {type(found).__name__}")
        return found

    return _FIELD.sub(value, text)


def get_template(name: str) -> Template:
    r"""The template of that name, or of a text with `{field}` marks, in which `\n` is a line end.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if _FIELD.search(name):
        text = name.replace("\\n", "\n")  # which a shell leaves as it is
        return Template(name, lambda fields: fill_text(text, fields))
    raise UserError(
        f"unknown template `{name}`; known: {', '.join(sorted(TEMPLATES))}, or a text with marks such as {{input}}"
    )


_TASK_AND_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_PROMPT_INPUT = _TASK_AND_INPUT + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

register_template("prompt_input", _PROMPT_INPUT)
register_template("prompt_no_input", _PROMPT_NO_INPUT)
register_template(
    "prompt_input_above",
    "Below is an input sentence as context, paired with an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Input:\n{input}\n\n### Instruction:\n{instruction}\n\n### Response:",
)
register_template(
    "double_prompt_input",
    _TASK_AND_INPUT + "### Instruction:\n{pre_instruction}\n\n### Input:\n{input}\n\n"
    "### Instruction:\n{post_instruction}\n\n### Response:",
)
register_template("prompt_no_alpaca", "{instruction}\n{input}\n")
register_template("prompt_no_alpaca_above", "{input}\n{instruction}\n")


@register_template("alpaca")
def _alpaca(fields: Mapping[str, str]) -> str:
    """`prompt_input`, or `prompt_no_input` where the input is missing or blank: what Alpaca's own training does."""
    return fill_text(_PROMPT_INPUT if _has_input(fields) else _PROMPT_NO_INPUT, fields)


@register_template("chat")
def _chat(fields: Mapping[str, str]) -> str:
    """The text of the user's turn. The tokenizer's chat template is put around it when the prompt is encoded."""
    return fill_text("{instruction}\n{input}" if _has_input(fields) else "{instruction}", fields)


def _has_input(fields: Mapping[str, str]) -> bool:
    value = fields.get("input") or ""
    return not isinstance(value, str) or bool(value.strip())


LANGUAGES: dict[str, str] = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "cy": "Welsh",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician",
    "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "iu": "Inuktitut", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh", "km": "Khmer", "ko": "Korean", "liv": "Livonian", "lt": "Lithuanian", "lv": "Latvian",
    "ms": "Malay", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "ps": "Pashto",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sah": "Yakut", "si": "Sinhala", "sk": "Slovak",
    "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil",
    "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese",
    "xh": "Xhosa", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
"""English names of languages by ISO 639 code."""

TRANSLATION_INSTRUCTION = "Translate the following sentences from [SRC] to [TGT]."
"""The instruction that the reference decodes WMT test sets with."""


def language_name(code: str) -> str:
    """The English name of a language code, such as `German` for `de`.

    Raises:
        UserError: the code is not in `LANGUAGES`.
    """
    if code not in LANGUAGES:
        raise UserError(f"unknown language code `{code}`; known: {', '.join(sorted(LANGUAGES))}")
    return LANGUAGES[code]


def split_pair(pair: str) -> tuple[str, str]:
    """Source and target code of a language pair: `en-de` gives `("en", "de")`.

    Raises:
        UserError: not two codes of two or three small letters with a dash between.
    """
    match = re.fullmatch(r"([a-z]{2,3})-([a-z]{2,3})", pair) if isinstance(pair, str) else None
    if match is None:
        raise UserError(f"`{pair}` is no language pair; write source-target, such as en-de")
    return match[1], match[2]


def fill_instruction(text: str, pair: str) -> str:
    """`text` with `[SRC]` and `[TGT]` replaced by the names of the pair's languages.

    Raises:
        UserError: the pair is malformed, or the text names a language that has no name in `LANGUAGES`.
    """
    codes = dict(zip(("SRC", "TGT"), split_pair(pair), strict=True))
    return re.sub(r"\[(SRC|TGT)\]", lambda match: language_name(codes[match[1]]), text)
