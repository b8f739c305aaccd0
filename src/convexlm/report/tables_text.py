"""The report's tables as Markdown, LaTeX and JSON: for a README, a paper, a script."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from convexlm.report import register_format
from convexlm.report.findings import headline, main_table, table_metrics
from convexlm.report.settings import read_settings
from convexlm.report.text import (
    UNSEEN,
    delta_text,
    finite,
    interval_text,
    is_number,
    metric_title,
    p_text,
    score_text,
    share_text,
    visible,
)
from convexlm.tables import selection_said

if TYPE_CHECKING:
    from collections.abc import Callable

    from convexlm.report.data import RunData

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$])")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
}


@register_format("md", "md")
def render_markdown(run: RunData) -> str:
    """The headline, the main table, the differences a direction and the signatures, in GitHub's Markdown."""
    title, said = headline(run)
    head, rows = _main_rows(run)
    chosen = selection_said(run.comparison)
    if chosen and run.comparison["selection"]["on"] == "test":
        said = [f"WARNING: {chosen}", *said]
    elif chosen:
        said = [*said, chosen]
    out = [f"## {_md(title)}", "", *(f"{_md(sentence)}  " for sentence in said), "", *_md_table(head, rows, 2)]
    head, rows = _output_rows(run)
    if rows:
        out += ["", "### Outputs", "", *_md_table(head, rows, 2)]
    head, rows = _direction_rows(run)
    if rows:
        out += ["", "### In every direction", "", *_md_table(head, rows, 5)]
    settings = read_settings(run)
    out += ["", "### Signatures", ""]
    # A backtick would end the code; no signature of sacreBLEU has one.
    out += [
        f"- {_md(name)} ({_md(where)}): `{_plain(text).replace('`', '')}`" for name, where, text in settings.signatures
    ]
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions)
    return "\n".join([*out, "", f"Versions: {_md(versions)}.", ""])


@register_format("latex", "tex")
def render_latex(run: RunData) -> str:
    """The main table as a `booktabs` tabular, the headline as its caption, signatures in comments."""
    title, _ = headline(run)
    head, rows = _main_rows(run)
    out = [r"% needs \usepackage{booktabs}"]
    if chosen := selection_said(run.comparison):
        out.append(f"% {_plain(chosen)}")
    out += [f"% {_plain(name)}: {_plain(text)}" for name, _, text in read_settings(run).signatures]
    out += [r"\begin{table}", r"\centering", rf"\caption{{{_tex(title)}.}}"]
    out += [rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}", r"\toprule", _tex_row(head), r"\midrule"]
    last = rows[0][1]
    for row in rows:
        if row[1] != last:
            out.append(r"\midrule")
        last = row[1]
        out.append(_tex_row(row))
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


@register_format("json", "json")
def render_json(run: RunData) -> str:
    """Headline, main table, gaps, tests a direction, training curves and settings; numbers in full precision."""
    title, said = headline(run)
    settings = read_settings(run)
    kept = (
        "baseline",
        "arms",
        "seeds",
        "checkpoints",
        "searches",
        "metrics",
        "corpora",
        "resampling",
        "table",
        "gaps",
        "selection",
        "outputs",
        "by_length",
        "by_reference_nll",
        "reference_nll",
        "checkpoints_scores",
    )
    report = {
        "schema": 1,
        "recipe": run.comparison["recipe"],
        "headline": title,
        "sentences": said,
        **{key: run.comparison[key] for key in kept},
        "paired": run.comparison["paired"],
        "scores": run.scores,
        "training": run.metrics,
        "signatures": [
            {"metric": name, "pairs": where, "signature": text} for name, where, text in settings.signatures
        ],
        "versions": dict(settings.versions),
        "resolved_recipe": run.recipe,
    }
    text = json.dumps(finite(report), indent=1, allow_nan=False, ensure_ascii=False, default=str)
    return UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def _main_rows(run: RunData) -> tuple[list[str], list[list[str]]]:
    """The main table's head and rows as plain text; empty cells where there is nothing to say."""
    metrics, primary = table_metrics(run), run.comparison["metrics"][0]
    compared, gaps = len(run.arms) > 1, bool(run.comparison["gaps"])
    head = ["objective", "search", metric_title(primary)]
    if compared:
        head += [f"vs {run.comparison['baseline']}", "95 % interval", "p", "p (Holm)"]
    if run.several_seeds:
        head.append("by seed")
    if gaps:
        head += ["beam - greedy", "95 % interval"]
    for metric in metrics[1:]:
        head += [metric_title(metric), f"vs {run.comparison['baseline']}"] if compared else [metric_title(metric)]
    rows = []
    for group in main_table(run):
        for row in group["rows"]:
            rows.append(_row(run, row, metrics, compared=compared, gaps=gaps))
    return head, rows


def _row(run: RunData, row: dict[str, Any], metrics: list[str], *, compared: bool, gaps: bool) -> list[str]:
    primary = metrics[0]
    cell = row["scores"][primary]
    line = [row["arm"], row["search"], score_text(cell.get("score"), primary)]
    if compared:
        line += [_delta(cell, primary), interval_text(cell, primary)]
        line += [_p(cell.get("p_two_sided", cell.get("p_value"))), _p(cell.get("p_holm"))]
    if run.several_seeds:
        line.append(", ".join(score_text(value, primary) for value in (cell.get("by_seed") or {}).values()))
    if gaps:
        gap = row["gap"] or {}
        line += [_delta(gap, primary), interval_text(gap, primary)]
    for metric in metrics[1:]:
        other = row["scores"][metric]
        line.append(score_text(other.get("score"), metric))
        if compared:
            line.append(_delta(other, metric))
    return line


def _direction_rows(run: RunData) -> tuple[list[str], list[list[str]]]:
    head = ["test set", "direction", "search", "objective", "seed", "metric", "score", "delta", "95 % interval"]
    head += ["p", "p (randomization)"]
    rows = []
    for row in run.comparison["paired"]:
        metric = row["metric"]
        if metric != run.comparison["metrics"][0]:
            continue
        line = [row["test_set"], row["pair"], row["search"], row["system"], row["seed"], metric_title(metric)]
        line += [score_text(row.get("score"), metric), _delta(row, metric), interval_text(row, metric)]
        line += [_p(row.get("p_two_sided", row.get("p_value"))), _p(row.get("p_ar"))]
        rows.append([str(value) for value in line])
    return head, rows


def _output_rows(run: RunData) -> tuple[list[str], list[list[str]]]:
    head = ["objective", "search", "length ratio", "repetitive", "cut", "s a sentence"]
    rows = []
    for row in run.comparison["outputs"]:
        ratio, cost = row["length_ratio"], row["seconds_per_sentence"]
        line = [row["arm"], row["search"], f"{ratio:.3f}" if is_number(ratio) else ""]
        line += [share_text(row["repetition_rate"]), share_text(row["cut_rate"])]
        rows.append([*line, f"{cost:.3g}" if is_number(cost) else ""])
    return head, rows


def _delta(row: dict[str, Any], metric: str) -> str:
    return delta_text(row["delta"], metric) if is_number(row.get("delta")) else ""


def _p(value: Any) -> str:
    return p_text(value) if is_number(value) else ""


def _plain(text: str) -> str:
    """On one line, with nothing unseen in it."""
    return " ".join(visible(text).split())


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", _plain(text))


def _md_table(head: list[str], rows: list[list[str]], words: int) -> list[str]:
    """A table whose first `words` columns are text, the others numbers."""
    rule = [":--" if index < words else "--:" for index in range(len(head))]
    return [_md_row(head, _md), _md_row(rule, str), *(_md_row(row, _md) for row in rows)]


def _md_row(cells: list[str], escape: Callable[[str], str]) -> str:
    return f"| {' | '.join(escape(cell) for cell in cells)} |"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in _plain(text))


def _tex_row(cells: list[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"
