from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from convexlm.cli import main
from report_helpers import make_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "toy", size=8, seeds=(1,), n_samples=5, steps=(50,))


@pytest.mark.parametrize(("name", "suffix"), [("html", "html"), ("md", "md"), ("latex", "tex"), ("json", "json")])
def test_writes_into_the_run_folder(run_dir: Path, name: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir), "--format", name]) == 0
    assert (run_dir / f"report.{suffix}").stat().st_size > 500
    assert f"report.{suffix}" in capsys.readouterr().out.replace("\n", "")


def test_output_file_and_json(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "page.html"
    assert main(["report", str(run_dir), "--output_file", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"report": str(path), "format": "html", "bytes": path.stat().st_size}
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN_DIR"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no recipe.yaml"),
        ([".", "--format", "pdf"], "invalid choice: 'pdf'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
