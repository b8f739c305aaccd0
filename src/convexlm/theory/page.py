"""The interactive page as one HTML file: style and scripts inside it, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from convexlm.objectives import Convex, Mle, Objective, Power
from convexlm.theory.problem import Floats, as_objective, check_lengths, check_probabilities
from convexlm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_CANDIDATES = 26  # they are named by letters
_LONGEST = 10_000
_CHOICES = [
    ("mle", "maximum likelihood"),
    ("convex", "convex"),
    ("power", "power"),
    ("token", "convex by token (DFT at k = 1)"),
]


def render_page(
    probabilities: Sequence[float] | Floats = (0.4, 0.3, 0.2, 0.1),
    lengths: float | Sequence[float] | Floats = 10,
    objective: str | Objective = "convex",
    **settings: Any,
) -> str:
    """The page, opened at these settings; arguments as in `optimum`.

    Raises:
        ValueError: as `optimum`; more than 26 candidates or a length above 10,000; an objective that the page does not
            compute: one of the user's own, or `power` by token.
    """
    d = check_probabilities(probabilities)
    if len(d) > MOST_CANDIDATES:
        raise ValueError(f"the page shows at most {MOST_CANDIDATES} candidates, not {len(d)}")
    all_lengths = check_lengths(lengths, len(d))
    if all_lengths.max() > _LONGEST:
        raise ValueError(f"the page takes lengths up to {_LONGEST:,}")
    chosen = as_objective(objective, settings)
    state = {
        "choice": _choice(chosen),
        "k": getattr(chosen, "k", 1.0),
        "mix": chosen.mle_mix,
        "weighting": chosen.length_weighting,
        "d": d.tolist(),
        "T": all_lengths.tolist(),
    }
    return _fill(state)


def is_page(content: bytes) -> bool:
    """Whether a file holds such a page, which may be written anew."""
    return content.startswith(b"<!doctype html>") and b"<title>What a convex objective wants</title>" in content[:2000]


def _choice(objective: Objective) -> str:
    if type(objective) is Convex and objective.level == "token":
        return "token"
    if type(objective) is Mle or (type(objective) in (Convex, Power) and objective.level == "sequence"):
        return objective.name
    what = f"`{objective.name}`" + (" by token" if type(objective) is Power else "")
    raise ValueError(f"the page computes mle, convex, power by sequence and convex by token, not {what}")


def _fill(state: dict[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    folder = files("convexlm") / "theory_page"
    page, style, compute, ui = (
        (folder / name).read_text(encoding="utf-8").strip()
        for name in ("page.html.j2", "page.css", "compute.js", "page.js")
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (compute, ui))
    return environment.from_string(page).render(
        objectives=_CHOICES,
        version=__version__,
        style=Markup(style),
        compute=Markup(compute),
        ui=Markup(ui),
        # Numbers and our own names only: nothing in it could end the script element.
        state=Markup(json.dumps(state, allow_nan=False)),
        script_hashes=Markup(" ".join(f"'sha256-{value}'" for value in hashes)),
    )
