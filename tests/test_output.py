"""Where results go: streams that cannot hold a character, are closed or full, and files that are there already."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convexlm import cli
from pipeline_helpers import ENVIRONMENT


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("h", "h2", "r"):
        words = ["größer 😀 ist", "das Haus", "ein Hund läuft"] if name != "h2" else ["größer", "das", "ein"]
        (tmp_path / name).write_text("".join(f"{word} hier im Wald heute\n" for word in words), encoding="utf-8")
    return tmp_path


def convexlm(
    words: list[Any], cwd: Path, encoding: str = "utf-8", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "convexlm.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, timeout=120, **options)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "ascii:strict"])
def test_a_table_is_printed_in_any_encoding(files: Path, encoding: str) -> None:
    words = ["compare", "--references", "r", "--target_lang", "de", "--systems", "a=h2", "b=h", "--n_samples", "20"]
    done = convexlm(words, files, encoding, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert rb"\u2605" in done.stdout and b"BLEU" in done.stdout  # the star of the best system


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_json_is_json_in_any_encoding(files: Path, encoding: str) -> None:
    names = ["hyp ö😀.txt"] if encoding == "ascii" else [b"h\xe9".decode("utf-8", "surrogateescape")]
    for name in names:
        (files / name).write_bytes((files / "h").read_bytes())
        words = ["score", "--hypotheses", name, "--references", "r", "--target_lang", "de", "--json"]
        done = convexlm(words, files, encoding, stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["hypotheses"] == name


def test_a_full_or_closed_output_is_one_line(files: Path) -> None:
    words = ["score", "--hypotheses", "h", "--references", "r", "--target_lang", "de", "--json"]
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            done = convexlm(words, files, stdout=full)
        assert done.returncode == 1
        assert done.stderr == b"convexlm score: standard output cannot be written (No space left on device)\n"
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "convexlm.cli", *words],
        cwd=files,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    assert closed.returncode == 2 and closed.stderr.count(b"\n") == 1 and b"closed" in closed.stderr


@pytest.mark.parametrize("place", ["h/x.jsonl", "/proc/x/y.jsonl"])
def test_a_comet_export_that_cannot_be_written_is_one_line(files: Path, capsys, monkeypatch, place: str) -> None:
    monkeypatch.chdir(files)
    words = ["score", "--hypotheses", "h", "--references", "r", "--target_lang", "de", "--sources", "r"]
    assert cli.main([*words, "--export_comet", place]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "cannot be written" in err


def test_samples_without_confidence_are_refused(files: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(files)
    words = ["score", "--hypotheses", "h", "--references", "r", "--target_lang", "de", "--n_samples", "5"]
    assert cli.main(words) == 2
    assert "--confidence" in capsys.readouterr().err
    assert cli.main([*words, "--confidence", "--json"]) == 0
    assert "bs:5" in json.loads(capsys.readouterr().out)["scores"][0]["signature"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("target_lang: no", None),
        ("target_lang: 'no'", None),
        ("confidence: true\nn_samples: 010", "bs:10"),
        ("confidence: true\nn_samples: 1e1", "'1e1'"),
        ("references: {a: b}", "c.yaml: `references` is a value or a list of them, not a mapping"),
        ("references: [[r]]", 'c.yaml: `references` is a list of plain values, and ["r"] is none'),
        ("references: [r, null]", "c.yaml: `references` is a list of plain values, and null is none"),
        ("hypotheses: [h, h]", "c.yaml: `hypotheses` takes one value, not a list of 2"),
    ],
)
def test_a_config_file_says_what_is_written_in_it(
    files: Path, capsys, monkeypatch, text: str, said: str | None
) -> None:
    monkeypatch.chdir(files)
    keys = {line.split(":")[0] for line in text.split("\n")}
    rest = {"hypotheses": "h", "references": "r", "target_lang": "de"}
    lines = [text, *(f"{key}: {value}" for key, value in rest.items() if key not in keys)]
    (files / "c.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code = cli.main(["score", "--config", "c.yaml", "--json"])
    out, err = capsys.readouterr()
    if said is None:
        assert code == 0 and json.loads(out)["target_lang"] == "no"
    elif said.startswith("bs:"):
        assert code == 0 and said in json.loads(out)["scores"][0]["signature"]
    else:
        assert code == 2 and said in err and err.count("\n") == 1
