"""The report as one HTML page: style, script, figures and sentences inside it, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from convexlm.report import register_format
from convexlm.report.figures import checkpoint_figures, cost_figures, direction_figures, strips, training_figures
from convexlm.report.findings import comet_rows, headline, main_table, table_metrics
from convexlm.report.parts import part_tables
from convexlm.report.sentences import read_sentences
from convexlm.report.settings import read_settings
from convexlm.report.text import (
    NOTHING,
    delta_text,
    interval_text,
    is_number,
    is_share,
    metric_title,
    p_text,
    score_text,
    script_json,
    share_text,
    visible,
)
from convexlm.significance import is_sure
from convexlm.tables import selection_said, signed

if TYPE_CHECKING:
    import jinja2

    from convexlm.report.data import RunData

TEMPLATES = "templates"


@register_format("html", "html")
def render_page(run: RunData) -> str:
    """The whole page."""
    title, said = headline(run)
    book = read_sentences(run)
    script = _asset("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            comparison=run.comparison,
            headline=title,
            sentences_said=said,
            metrics=table_metrics(run),
            table=main_table(run),
            strips=strips(run),
            comet=comet_rows(run),
            parts=part_tables(run),
            selection_said=selection_said(run.comparison),
            training=training_figures(run),
            checkpoints=checkpoint_figures(run),
            costs=cost_figures(run),
            directions=direction_figures(run),
            book=book,
            payload=Markup(script_json(book.payload)),
            settings=read_settings(run),
            style=Markup(_asset("report.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convexlm.report", TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        score=score_text, delta=delta_text, p=p_text, metric_title=metric_title, is_share=is_share, is_sure=is_sure
    )
    environment.filters["percent"] = share_text
    environment.filters["fixed"] = lambda value: f"{value:.3g}" if is_number(value) else NOTHING
    environment.filters["four"] = lambda value: f"{value:.4f}" if is_number(value) else NOTHING
    environment.filters["signed"] = signed
    environment.globals["interval"] = interval_text
    return environment


def _shown(value: Any) -> Any:
    """Every text that a template prints, with what cannot be seen made visible."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _asset(name: str) -> str:
    """A style sheet or script of ours, as it goes into the page."""
    return (files("convexlm.report") / TEMPLATES / name).read_text(encoding="utf-8").strip()
