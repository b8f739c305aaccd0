"""Numbers and foreign text as a report shows them."""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeGuard

from convexlm.tables import SHARES, TITLES, signed

NOTHING = "–"
# Characters that show nothing, reorder what is around them, or cannot stand in a UTF-8 file: all but tab, line feed,
# carriage return of the C0 controls, DEL and the C1 controls, bidirectional controls, BOM, lone surrogates,
# noncharacters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """`text` with every character that cannot be seen, or that would reorder others, as `⟨U+202E⟩`."""
    return UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def script_json(value: Any) -> str:
    """JSON that can stand inside a `<script>` element, whatever text it holds, and in a UTF-8 file."""
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub(f"[<>&]|{UNSEEN.pattern}", lambda match: f"\\u{ord(match[0]):04x}", text)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metric_title(metric: str) -> str:
    """What a metric is called in print."""
    from convexlm.scoring import METRICS

    if metric == "comet":
        return "COMET"
    return TITLES.get(metric) or (METRICS[metric].title if metric in METRICS else metric)


def is_share(metric: str) -> bool:
    """Whether a measure is a share from 0 to 1, shown in percent."""
    return metric in SHARES


def score_text(value: Any, metric: str) -> str:
    """A score: two decimals (COMET, which is about 0.8: four), or a share in percent; a dash for what is no number."""
    if not is_number(value):
        return NOTHING
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.{4 if metric == 'comet' else 2}f}"


def share_text(value: Any) -> str:
    """A share from 0 to 1 in percent; a dash for what is no number."""
    return f"{100 * value:.1f} %" if is_number(value) else NOTHING


def delta_text(value: Any, metric: str) -> str:
    """A difference of scores, with its sign; shares in percentage points."""
    if not is_number(value):
        return NOTHING
    return (signed(100 * value, 1) if is_share(metric) else signed(value)).replace("-", "−")


def interval_text(row: dict[str, Any], metric: str, low: str = "delta_low", high: str = "delta_high") -> str:
    """`−0.11 to +0.42`; empty where there is no interval."""
    if not is_number(row.get(low)) or not is_number(row.get(high)):
        return ""
    return f"{delta_text(row[low], metric)} to {delta_text(row[high], metric)}"


def p_text(value: Any) -> str:
    """A p-value: three decimals, `< 0.001` below that."""
    if not is_number(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def finite(value: Any) -> Any:
    """`value`, with None for every number that JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value
