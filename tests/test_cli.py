"""The command line: how fast it starts, its exit codes, and what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli_helpers import offline, refused
from convexlm import cli
from convexlm.errors import UserError
from convexlm.options import VerbParser
from convexlm.version import __version__
from pipeline_helpers import ENVIRONMENT, call, recipe_with, write_recipe


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield from offline(monkeypatch)


def verb(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Put a verb of our own in the place of `score`."""
    module = SimpleNamespace(
        make_parser=lambda prog: VerbParser(prog, "For tests."),
        run=run,
        show=lambda result, console: console.print("shown"),
    )
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


# -- start


def test_the_overview_needs_no_heavy_import() -> None:
    code = (
        "import sys, convexlm.cli\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sacrebleu', 'numpy', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert convexlm.cli.main(['--help']) == 0 and convexlm.cli.main(['--version']) == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'sacrebleu', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"convexlm {__version__}")


@pytest.mark.parametrize("name", ["run", "demo", "score", "compare", "export"])
def test_the_help_of_light_verbs_needs_no_torch(name: str) -> None:
    code = (
        "import sys, convexlm.cli\n"
        f"try: convexlm.cli.main(['{name}', '--help'])\n"
        "except SystemExit as error: assert not error.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: convexlm {name}") and "--config" in done.stdout


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_lists_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"\n  {name} " in out for name in cli.VERBS)


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 0
    assert capsys.readouterr() == (f"convexlm {__version__}\n", "")


@pytest.mark.parametrize("word", ["trian", "--bogus", "", "cli", "../x"])
def test_an_unknown_verb_is_one_line_and_exit_code_2(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "--help"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"unknown verb `{word}`; " in err and "train" in err


# -- exit codes and output


def test_done_is_0_and_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verb(monkeypatch, lambda args: {})
    assert cli.main(["score"]) == 0
    assert capsys.readouterr() == ("shown\n", "")


def test_json_is_one_object_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verb(monkeypatch, lambda args: {"path": Path("x"), "text": "ü\u2028\n"})
    assert cli.main(["score", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    assert json.loads(out) == {"path": "x", "text": "ü\u2028\n"}


def test_a_users_mistake_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> None:
        raise UserError("wrong\nin two lines")

    verb(monkeypatch, run)
    assert refused(["score"], capfd) == "convexlm score: error: wrong in two lines"
    assert "unknown option --bogus (see " in refused(["score", "--bogus"], capfd)


def test_a_misspelt_word_is_named_before_what_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["score", "--hypotheses", "h", "--reference=r", "--target_lang", "de"]
    assert "unknown option --reference; did you mean `--references`?" in refused(words, capfd)
    assert "did you mean `--learning_rate`?" in refused(["train", "--learning_rat", "1e-3"], capfd)
    assert cli.main(["sore"]) == 2
    assert capfd.readouterr().err == "convexlm: error: unknown verb `sore`; did you mean `score`?\n"


def test_a_bug_is_no_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any) -> None:
        raise RuntimeError("a bug")

    verb(monkeypatch, run)
    with pytest.raises(RuntimeError):  # which Python turns into a traceback and exit code 1
        cli.main(["score"])


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> None:
        raise KeyboardInterrupt

    verb(monkeypatch, run)
    assert cli.main(["score"]) == 130
    assert capsys.readouterr() == ("", "convexlm score: stopped; the same command goes on from here\n")


def test_sigterm_is_one_line_and_143_and_not_a_workers(monkeypatch, capsys) -> None:
    ended = []

    def run(args: Any) -> None:
        ready, told = os.pipe()
        worker = os.fork()
        if worker == 0:  # a pool's worker: ended by its own SIGTERM, without a word
            os.write(told, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.kill(worker, signal.SIGTERM)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    verb(monkeypatch, run)
    assert cli.main(["score"]) == 143
    assert ended == [-signal.SIGTERM]
    assert capsys.readouterr() == ("", "convexlm score: stopped; the same command goes on from here\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_ctrl_c_in_a_run_ends_it_with_one_line(tmp_path: Path) -> None:
    from pipeline_helpers import start

    recipe = write_recipe(tmp_path, recipe_with(arms__base__max_steps=10_000, train__logging_steps=1))
    process = start(["run", recipe, "--run_dir", tmp_path / "run"], tmp_path)
    metrics = tmp_path / "run" / "train" / "base.seed1" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert "Traceback" not in err
    last = err.rstrip().split("\n")[-1]
    assert last.startswith("convexlm run: stopped by SIGINT after step ") and last.endswith("goes on from there")


@pytest.mark.parametrize("words", [["--help"], ["run", "tiny.yaml", "--dry_run"]])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, words: list[str]) -> None:
    write_recipe(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "convexlm.cli", *words],
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    os.close(writing)
    assert done.stderr == ""


def test_the_module_and_the_command_are_the_same(tmp_path: Path) -> None:
    done = call(["run", "nothing.yaml"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "convexlm run: error: nothing.yaml: no such file\n"
