"""Tokens, keys and passwords: found in what people write, so that none reaches a file that is passed on."""

from __future__ import annotations

import re
from typing import Any

# Each begins a word, for `task-translation` and `llama_hf_converted` hold the same letters; and each is as long and as
# mixed as names of models and files seldom are.
_TOKEN = (
    r"hf_[A-Za-z0-9]{16,}|sk-(?:[A-Za-z0-9]{32,}|(?=[\w-]*\d)(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,})"
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|A[KS]IA[0-9A-Z]{12,}|eyJ[\w-]{10,}\.[\w-]+"
)
_LOOKS_SECRET = rf"(?<![A-Za-z0-9_])(?:{_TOKEN})|://[^/\s:@]+:[^/\s@]+@"
_SECRET = re.compile(rf"{_LOOKS_SECRET}|(?i:token|secret|passwo?r?d|api[_-]?key)\s*[=:]\s*\S+")
_VALUE = re.compile(_LOOKS_SECRET)
_KEY = re.compile(r"(?i)(\w+_)?(api_?key|secret|password)|(hub_|access_|auth_|push_to_hub_)?token")


def clean(text: Any) -> str:
    """A text without what looks like a token, a key or a password, on one line."""
    return _SECRET.sub("(removed)", " ".join(str(text).split()))


def find_secret(values: Any, path: str = "") -> str | None:
    """Where in a mapping a secret is, as `train.hub_token`: by its key, or by what its value looks like."""
    if isinstance(values, dict):
        for key, value in values.items():
            here = f"{path}.{key}" if path else str(key)
            if isinstance(value, str) and value and _KEY.fullmatch(str(key)):
                return here
            if found := find_secret(value, here):
                return found
        return None
    if isinstance(values, list):
        return next((found for value in values if (found := find_secret(value, path))), None)
    return path if isinstance(values, str) and _VALUE.search(values) else None
