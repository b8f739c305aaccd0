"""A diagnosis as one HTML page in the report's style: no script, nothing loaded from anywhere."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from convexlm.diagnosis.advice import grouped
from convexlm.diagnosis.figures import comparison_figures, data_figures, share_figures, style_of
from convexlm.report.text import NOTHING, visible

if TYPE_CHECKING:
    import jinja2


def render_page(result: dict[str, Any]) -> str:
    """The whole page of a result of `diagnose`."""
    return (
        _environment()
        .get_template("diagnosis.html.j2")
        .render(
            result=result,
            model_name=_last_part(result["model"]),
            dataset_name=_last_part(result["dataset"]),
            headline=headline(result),
            advice=grouped(result["advice"]),
            figures=data_figures(result),
            share_figures=[
                *share_figures(result, "by_p_bar"),
                *share_figures(result, "by_p_bar", "logit_share"),
                *share_figures(result, "by_length"),
            ],
            comparison_figures=comparison_figures(result),
            lists=record_lists(result),
            style=Markup(
                _asset("convexlm.report", "report.css") + "\n" + _asset("convexlm.diagnosis", "diagnosis.css")
            ),
        )
    )


def headline(result: dict[str, Any]) -> str:
    """What the page is titled: how likely the answers are, and the mean weight of the first and last objective."""
    entries = result["objectives"]
    ends = entries if len(entries) == 1 else (entries[0], entries[-1])
    weights = ", ".join(f"{entry['update_ratio']:.2g} for {entry['label']}" for entry in ends)
    return f"Median p̄ {result['data']['p_bar']['quantiles']['0.5']:.2g}; mean weight {weights}"


def record_lists(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The most neglected and most favoured records, objectives with the same lists together."""
    lists: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in result["objectives"]:
        for title, rows in (("neglected", entry["neglected"]), ("favoured", entry["favoured"])):
            key = (title, tuple(row["index"] for row in rows))
            group = lists.setdefault(key, {"title": title, "labels": [], "rows": [{**row, "by": []} for row in rows]})
            group["labels"].append(entry["label"])
            for known, row in zip(group["rows"], rows, strict=True):
                known["by"].append((entry["label"], row["weight"]))
    for group in lists.values():
        for row in group["rows"]:
            row.update(result["records"][str(row["index"])])
    return sorted(lists.values(), key=lambda group: group["title"] != "neglected")


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convexlm.diagnosis", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(percent=_percent, short=_short)
    environment.globals["style_of"] = style_of
    return environment


def _shown(value: Any) -> Any:
    """Every text that the template prints, with what cannot be seen made visible."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _percent(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if value < 0.9995 else "100 %"


def _short(value: float | None) -> str:
    if value is None:
        return NOTHING
    text = f"{value:.3f}" if abs(value) >= 0.0095 or value == 0 else f"{value:.1e}"
    return text.replace("-", "−")


def _last_part(name: str) -> str:
    """A page may be passed on, so it names no folders of the machine it was made on."""
    return Path(name).name or name


def _asset(package: str, name: str) -> str:
    return (files(package) / "templates" / name).read_text(encoding="utf-8").strip()
