"""The files of a report: the other formats, folders that cannot be reported, and what is not written over."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from convexlm.errors import UserError
from convexlm.report import write_report
from report_helpers import comparison_of

if TYPE_CHECKING:
    from pathlib import Path


# -- other formats


def test_markdown_latex_and_json_have_the_tables(report_run: Path, tmp_path: Path) -> None:
    markdown = write_report(report_run, tmp_path / "r.md", format="md").read_text(encoding="utf-8")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:8]}) == 1
    row = next(
        row for row in comparison_of(report_run)["table"] if row["arm"] == "convex-k3" and row["metric"] == "bleu"
    )
    assert f"| convex-k3 | greedy | {row['score']:.2f} | {row['delta']:+.2f} |" in markdown
    latex = write_report(report_run, tmp_path / "r.tex", format="latex").read_text(encoding="utf-8")
    assert f"convex-k3 & greedy & {row['score']:.2f} & {row['delta']:+.2f} &" in latex
    assert r"95 \% interval" in latex
    found = json.loads(write_report(report_run, tmp_path / "r.json", format="json").read_text(encoding="utf-8"))
    assert found["table"] == comparison_of(report_run)["table"]
    assert set(found["metrics"]) == {"bleu", "chrf"}
    assert len(found["training"]) == 6


def test_an_unknown_format_names_the_known(report_run: Path) -> None:
    with pytest.raises(UserError, match="unknown report format `pdf`; known: html, md, latex, json"):
        write_report(report_run, format="pdf")


# -- folders that cannot be reported


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        write_report(tmp_path / "file")
    with pytest.raises(UserError, match=r"is no run folder: it has no recipe\.yaml"):
        write_report(tmp_path)


def test_the_missing_stage_is_named(report_copy: Path) -> None:
    (report_copy / "comparison.json").unlink()
    with pytest.raises(UserError, match=r"no comparison\.json \(stage `score and compare`\)"):
        write_report(report_copy)
    shutil.rmtree(report_copy / "decode")
    with pytest.raises(UserError, match="stage `decode`"):
        write_report(report_copy)
    shutil.rmtree(report_copy / "train")
    with pytest.raises(UserError, match="stage `train`"):
        write_report(report_copy)


def test_broken_files_are_named(report_copy: Path) -> None:
    (report_copy / "comparison.json").write_text("{\n nonsense")
    with pytest.raises(UserError, match=r"comparison\.json, line 2: not valid JSON"):
        write_report(report_copy)
    (report_copy / "comparison.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="another version"):
        write_report(report_copy)
    (report_copy / "comparison.json").write_text('{"schema": 1, "recipe": "x"}')
    with pytest.raises(UserError, match="has no `baseline`"):
        write_report(report_copy)


# -- where it is written


def test_an_output_that_cannot_be_written(report_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_report(report_run, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(report_run, tmp_path / "file" / "page.html")


def test_a_report_writes_over_earlier_reports_only(report_run: Path, tmp_path: Path) -> None:
    for format in ("html", "md", "latex", "json"):
        path = tmp_path / "out"
        path.unlink(missing_ok=True)
        assert write_report(report_run, path, format=format) == path
        assert write_report(report_run, path, format=format) == path
        path.write_text("mine\n")
        with pytest.raises(UserError, match="is no earlier report"):
            write_report(report_run, path, format=format)
        assert path.read_text() == "mine\n"
    before = (report_run / "scores.jsonl").read_bytes()
    with pytest.raises(UserError, match="is no earlier report"):
        write_report(report_run, report_run / "scores.jsonl")
    assert (report_run / "scores.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="in place of -"):
        write_report(report_run, "-")
