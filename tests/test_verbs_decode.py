"""`convexlm decode` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from convexlm.cli import main
from convexlm.tokenization import PromptSettings
from decoding_helpers import SOURCES, fake_checkpoint, make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "".join(source + "\n" for source in SOURCES)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("verb") / "checkpoint-60", steps=60)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    path = tmp_path / "test.en"
    path.write_text(TEXT, encoding="utf-8")
    return path


def words(checkpoint: Path | str, sources: Path, out: Path, *more: str) -> list[str]:
    required = ["--model_name_or_path", str(checkpoint), "--sources", str(sources), "--output_file", str(out)]
    return ["decode", *required, "--max_new_tokens", "16", "--device", "cpu", *more]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().split("\n")
    assert len(lines) == 1
    assert lines[0].startswith("convexlm decode: error: ")
    return lines[0]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_json_result_and_files(checkpoint: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new" / "folder" / "out.jsonl"
    argv = words(checkpoint, sources, out, "--pair", "en-de", "--num_beams", "4", "--no_repeat_ngram_size", "3")
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["output_file"] == str(out)
    assert result["num_sentences"] == len(SOURCES)
    assert (result["resumed"], result["backend"], result["search"]) == (0, "hf", "beam4")
    assert result["seconds"] > 0
    assert result["sentences_per_second"] > 0
    assert result["tokens_per_second"] > 0
    rows = read(out)
    assert [row["source"] for row in rows] == SOURCES
    assert result["cut"] == sum(not row["finished"] for row in rows)
    assert f"{len(SOURCES)}/{len(SOURCES)} sentences" in captured.err
    assert "Loading weights" not in captured.err
    # Again: nothing to do.
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.out
    assert f"convexlm score --hypotheses {out} --references FILE --target_lang de" in captured.out.replace("\n", "")
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    # Another search into the same file.
    message = refused(capsys, words(checkpoint, sources, out, "--pair", "en-de"))
    assert "num_beams: 4 there, 1 now" in message
    assert out.read_bytes() == before[0]


def test_the_limit_and_what_was_written(
    checkpoint: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.jsonl"
    assert main(words(checkpoint, sources, out, "--pair", "en-de", "--limit", "2", "--batch_size", "1")) == 0
    assert f"{out}: 2 sentences (greedy)" in capsys.readouterr().out.replace("\n", "")
    assert len(read(out)) == 2
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert (meta["test_set"], meta["pair"], meta["num_sentences"]) == ("test.en", "en-de", 2)


def test_records_are_not_taken_for_sources(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "s.jsonl").write_text('{"source": "one"}\n')
    argv = words(checkpoint, tmp_path / "s.jsonl", tmp_path / "out.jsonl", "--pair", "en-de")
    assert "s.jsonl: is JSON, and would be read as plain text" in refused(capsys, argv)


def test_the_template_is_the_checkpoints_unless_given(
    checkpoint: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import shutil

    own, none = tmp_path / "own", tmp_path / "none"
    for folder in (own, none):
        shutil.copytree(checkpoint, folder)
    PromptSettings("prompt_no_alpaca", False).save(own)
    (none / "convexlm.json").unlink()
    seen = {}
    for name, folder, more in (
        ("own", own, []),
        ("given", own, ["--template", "alpaca"]),
        ("none", none, []),
        ("instruction", none, ["--instruction", "Say it in [TGT]."]),
    ):
        out = tmp_path / f"{name}.jsonl"
        assert main(words(folder, sources, out, "--pair", "en-de", *more)) == 0
        assert ("using the template `alpaca`" in capsys.readouterr().err) == (folder == none)
        meta = json.loads((tmp_path / f"{name}.meta.json").read_text())
        seen[name] = (meta["prompt"]["template"], meta["prompts_sha256"])
    assert [template for template, _ in seen.values()] == ["prompt_no_alpaca", "alpaca", "alpaca", "alpaca"]
    assert seen["given"] == seen["none"]
    assert len({prompts for _, prompts in seen.values()}) == 3


def test_the_instruction_from_a_file_and_a_set_without_languages(
    checkpoint: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "instruction.txt"
    file.write_text("Say it in [TGT].\n")
    hashes = []
    for name, more in (("a", ["--instruction_file", str(file)]), ("b", ["--instruction", "Say it in [TGT]."])):
        assert main(words(checkpoint, sources, tmp_path / f"{name}.jsonl", "--pair", "en-de", *more)) == 0
        hashes.append(json.loads((tmp_path / f"{name}.meta.json").read_text())["prompts_sha256"])
    assert hashes[0] == hashes[1]
    assert main(words(checkpoint, sources, tmp_path / "c.jsonl", "--instruction", "Say it shorter.")) == 0
    capsys.readouterr()
    assert "--pair en-de" in refused(capsys, words(checkpoint, sources, tmp_path / "d.jsonl"))


def test_bad_input_is_one_line(tmp_path: Path, sources: Path, capsys: pytest.CaptureFixture[str]):
    model, out = fake_checkpoint(tmp_path / "model"), tmp_path / "out.jsonl"
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    pair = ["--pair", "en-de"]
    cases = [
        (words(tmp_path / "nothing", sources, out, *pair), "no such checkpoint folder"),
        (words(tmp_path, sources, out, *pair), "not a checkpoint folder"),
        (words(model, tmp_path / "nothing", out, *pair), "nothing: no such file"),
        (words(model, empty, out, *pair), "the file is empty"),
        (words(model, sources, out, "--pair", "english"), "no language pair"),
        (words(model, sources, out, "--pair", "en-qq"), "unknown language code `qq`"),
        (words(model, sources, out, *pair, "--num_beams", "0"), "num_beams"),
        (words(model, sources, out, *pair, "--num_beams", "two"), "--num_beams"),
        (words(model, sources, out, *pair, "--length_penalty", "nan"), "length_penalty"),
        (words(model, sources, out, *pair, "--batch_size", "0"), "batch_size"),
        (words(model, sources, out, *pair, "--token_budget", "0"), "budget"),
        (words(model, sources, out, *pair, "--limit", "0"), "--limit"),
        (words(model, sources, out, *pair, "--template", "nope"), "unknown template `nope`"),
        (words(model, sources, out, *pair, "--backend", "nope"), "unknown decoding backend `nope`"),
        (words(model, sources, out, *pair, "--dtype", "int8"), "unknown dtype `int8`"),
        (words(model, sources, out, *pair, "--instruction_file", str(empty)), "the file is empty"),
        (words(model, sources, out, *pair, "--instruction", "a", "--instruction_file", "b"), "not allowed with"),
        (words(model, sources, out, *pair, "--instruction", " "), "--instruction is empty"),
        (words(model, sources, out, *pair, "--instruction", "\udcdcber"), "--instruction is no UTF-8 text"),
        (words(model, sources, out, *pair, "--temperature", "1"), "temperature is for sampling"),
        (words(model, sources, out, *pair, "--documents", "a.csv"), "not allowed with argument --sources"),
        (words(model, sources, tmp_path / "empty" / "out.jsonl", *pair), "empty/out.jsonl"),
        (words(model, sources, tmp_path, *pair), "is a folder"),
        (words(model, sources, tmp_path / f"{'x' * 240}.jsonl", *pair), "a name of at most 237 bytes"),
        (words(model, sources, out, *pair, "--revision", "main"), "--revision is of a hub name"),
    ]
    for argv, message in cases:
        assert message in refused(capsys, argv), argv
    (model / "convexlm.json").write_text('{"prompt": {"template": "alpaca", "add_bos": "yes"}}')
    assert "add_bos" in refused(capsys, words(model, sources, out, *pair))
    (model / "convexlm.json").unlink()
    (model / "config.json").write_text("{")
    assert main(words(model, sources, out, *pair)) == 2
    assert not out.exists()


def test_what_is_to_be_decoded_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, out = fake_checkpoint(tmp_path / "model"), tmp_path / "out.jsonl"
    table = tmp_path / "news.csv"
    table.write_text("article,highlights\na,b\n")
    argv = ["decode", "--model_name_or_path", str(model), "--output_file", str(out)]
    for more, message in (
        ([], "Give --sources FILE, --documents FILE, or --test_set NAME"),
        (["--test_set", "wmt22"], "give its direction with --pair"),
        (["--test_set", "wmt22", "--pair", "en-eo"], "sacreBLEU's `wmt22` has no pair `en-eo`"),
        (["--test_set", "wmt2222", "--pair", "en-de"], "sacreBLEU has no test set `wmt2222`"),
        (["--documents", str(table)], "what is to be done with the documents"),
        (["--documents", str(table), "--instruction", "x", "--pair", "en-de"], "that language twice"),
        (["--documents", str(out), "--instruction", "x"], "no such file"),
    ):
        assert message in refused(capsys, [*argv, *more]), more


def test_documents_and_a_test_set_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path
):
    """Real ones: CNN/DailyMail with its ids, and wmt22 en-zh out of a copy of sacreBLEU's cache, without a network."""
    argv = ["decode", "--model_name_or_path", str(checkpoint), "--device", "cpu", "--max_new_tokens", "4", "--json"]
    table = tmp_path / "news.jsonl"
    rows = [{"id": f"d{number}", "document": source, "summary": "x"} for number, source in enumerate(SOURCES, 1)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows if row["document"]))
    more = ["--documents", str(table), "--instruction", "Summarize:", "--output_file", str(tmp_path / "a.jsonl")]
    assert main([*argv, *more, "--limit", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["test_set"], result["pair"], result["num_sentences"]) == ("news", "en-en", 3)
    assert [row["id"] for row in read(tmp_path / "a.jsonl")] == ["d1", "d3", "d4"]

    shutil.copytree(shared_data / "sacrebleu", tmp_path / "cache")
    more = ["--test_set", "wmt22", "--pair", "en-zh", "--limit", "2", "--output_file", str(tmp_path / "b.jsonl")]
    done = subprocess.run(
        [sys.executable, "-m", "convexlm.cli", *argv, *more],
        env={**os.environ, "SACREBLEU": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wanted = (shared_data / "wmt22" / "newstest22.en-zh.en").read_text(encoding="utf-8").split("\n")[:2]
    assert [row["source"] for row in read(tmp_path / "b.jsonl")] == wanted
    assert json.loads((tmp_path / "b.meta.json").read_text())["test_set"] == "wmt22"


@pytest.mark.slow
def test_kill_9_of_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Killed while it loads and while it decodes, with a real model: the bytes of a run that was left alone."""
    many = tmp_path / "many.en"
    many.write_text("".join(f"{source} house {number}\n" for number in range(20) for source in SOURCES))
    more = ["--pair", "en-de", "--num_beams", "2", "--batch_size", "3"]
    assert main(words(checkpoint, many, tmp_path / "whole.jsonl", *more)) == 0
    out = tmp_path / "out.jsonl"
    argv = [sys.executable, "-m", "convexlm.cli", *words(checkpoint, many, out, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lengths = [0]
    # In time while the libraries load, then once batches were written.
    for wait in (1.5, None):
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=environment) as process:
            part = tmp_path / "out.jsonl.part"
            began = time.monotonic()
            while process.poll() is None and time.monotonic() - began < (wait or 60):
                if wait is None and part.exists() and part.stat().st_size > lengths[-1] + 4000:
                    break
                time.sleep(0.005)
            process.kill()
        lengths.append(part.stat().st_size if part.exists() else 0)
    assert lengths[-1] > lengths[1], "it should have been killed while decoding"
    assert main([*words(checkpoint, many, out, *more), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert 0 < result["resumed"] < result["num_sentences"]
    # Compared without the last digits of the scores: in the subprocess another number of threads adds them up.
    for row, other in zip(read(out), read(tmp_path / "whole.jsonl"), strict=True):
        for key in ("log_prob", "mean_log_prob"):
            assert row.pop(key) == pytest.approx(other.pop(key), abs=1e-4)
        assert row == other


@pytest.mark.parametrize("name", [".", "/", ""])
def test_an_output_file_without_a_name_is_refused(
    checkpoint: Path, sources: Path, capsys, monkeypatch, tmp_path, name
):
    monkeypatch.chdir(tmp_path)
    argv = ["decode", "--model_name_or_path", str(checkpoint), "--sources", str(sources), "--pair", "en-de"]
    assert main([*argv, "--output_file", name]) == 2
    assert "is a folder, expected a file to write" in capsys.readouterr().err
