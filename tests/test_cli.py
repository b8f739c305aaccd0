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

from convexlm import cli
from convexlm.errors import UserError
from convexlm.options import VerbParser
from convexlm.version import __version__
from pipeline_helpers import ENVIRONMENT, call, recipe_with, snapshot, write_recipe


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


def verb(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Put a verb of our own in the place of `score`."""
    module = SimpleNamespace(
        make_parser=lambda prog: VerbParser(prog, "For tests."),
        run=run,
        show=lambda result, console: console.print("shown"),
    )
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)


def refused(words: list[Any], capfd: pytest.CaptureFixture[str]) -> str:
    """Run in this process; the one line on stderr."""
    capfd.readouterr()
    code = cli.main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert code == cli.EXIT_USER_ERROR, err
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith(f"convexlm {words[0]}: error: ")
    return err.rstrip("\n")


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


# -- bad input: one line, exit code 2, and nothing written over

GOOD = {"instruction": "Translate.", "input": "a dog", "output": "ein Hund"}
DATA = [
    (None, "no such file"),
    ("", "empty"),
    (json.dumps(GOOD) + '\n{"instruction": \n', "line 2"),
    (json.dumps(GOOD) + '\n{"instruction": "Translate.", "input": "a cat"}\n', "line 2: no output"),
    (json.dumps(GOOD) + '\n{"instruction": "Translate.", "output": ""}\n', "line 2: no output"),
    (json.dumps(GOOD) + '\n{"instruction": "Translate.", "output": null}\n', "line 2: no output"),
    ("[]", ""),
]


@pytest.fixture
def training(tmp_path: Path) -> list[Any]:
    """The words of a `convexlm train` that would succeed."""
    from convexlm.tinyworld.tokenizer import train_tokenizer

    train_tokenizer(["a dog", "ein Hund"], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    config = recipe_with()["model"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text(json.dumps(GOOD) + "\n")
    words = ["train", "--dataset", tmp_path / "data.jsonl", "--config_name", tmp_path / "config.json"]
    words += ["--tokenizer_name", tmp_path / "tokenizer", "--output_dir", tmp_path / "out", "--report_to", "none"]
    return [*words, "--use_cpu", "true", "--max_steps", "1", "--objective", "mle"]


@pytest.mark.parametrize(("content", "said"), DATA)
def test_train_refuses_data_it_cannot_use(
    training: list[Any], tmp_path: Path, content: str | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.unlink()
    if content is not None:
        data.write_text(content)
    line = refused(training, capfd)
    assert str(data) in line and said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--template", "alpacca"], "unknown template `alpacca`"),
        (["--objective", "convx"], "convx"),
        (["--objectve", "mle"], "unknown option --objectve; did you mean `--objective`?"),
        (["--objective", "convex", "--k", "0"], "k"),
        (["--objective", "convex", "--k", "-1"], "k"),
        (["--objective", "convex", "--k", "nan"], "k"),
        (["--objective", "power", "--k", "1.5"], "k"),
        (["--objective", "mle", "--k", "1"], "k"),
        (["--max_records", "0"], "--max_records must be at least 1"),
        (["--max_length", "0"], "--max_length"),
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--optim", "addam"], "addam"),
        (["--max_length", "5"], "max_length 5 is filled by the prompt in all 1 records"),
        (["--config_name", "nothing.json"], "nothing.json"),
    ],
)
def test_train_refuses_options_it_cannot_use(
    training: list[Any], tmp_path: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in refused([*training, *words], capfd)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_train_refuses_a_folder_with_checkpoints(
    training: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-5" / "convexlm.json").write_text("{}")
    before = snapshot(tmp_path / "out")
    assert "holds checkpoints already; give --resume" in refused(training, capfd)
    assert snapshot(tmp_path / "out") == before


def test_train_refuses_a_checkpoint_folder_that_is_none(
    training: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    words = [*training, "--model_name_or_path", tmp_path / "empty"]
    start = words.index("--config_name")
    del words[start : start + 2]
    assert "no model there (config.json is missing)" in refused(words, capfd)


def test_a_prompt_that_fills_max_length_is_counted_and_named(
    training: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    long = {**GOOD, "input": "a dog " * 100}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, long, GOOD, long)))
    capfd.readouterr()
    assert cli.main([*map(str, training), "--max_length", "64", "--logging_steps", "1", "--json"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert len(result["dropped"]) == 2 and result["records"] == 2
    assert "2 records dropped, for their prompts alone fill max_length=64" in err
    assert all(name in err for name in result["dropped"])
    logged = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "NaN" not in logged and "nan" not in logged


@pytest.fixture
def decoding(tmp_path: Path) -> list[Any]:
    (tmp_path / "sources.txt").write_text("a\nb\n")
    return [
        *("decode", "--sources", tmp_path / "sources.txt", "--pair", "en-de"),
        *("--output_file", tmp_path / "out.jsonl", "--model_name_or_path"),
    ]


def test_decode_refuses_a_checkpoint_folder_that_is_none(
    decoding: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused([*decoding, tmp_path / "empty"], capfd)
    assert "sources.txt" in refused([*decoding, tmp_path / "sources.txt"], capfd)
    assert "no-such-folder" in refused([*decoding, tmp_path / "no-such-folder"], capfd)
    assert not (tmp_path / "out.jsonl").exists()


def test_score_refuses_files_of_different_length(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hyp").write_text("a\nb\n")
    (tmp_path / "ref").write_text("a\nb\nc\n")
    words = ["score", "--hypotheses", tmp_path / "hyp", "--references", tmp_path / "ref", "--target_lang", "de"]
    line = refused(words, capfd)
    assert "2 lines" in line and "3" in line


@pytest.mark.parametrize(("content", "said"), DATA[:-1])
def test_run_refuses_data_before_it_makes_anything(
    tmp_path: Path, content: str | None, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    recipe = write_recipe(tmp_path, recipe_with(data={"dataset": str(data)}))
    for words in ([], ["--dry_run"]):
        line = refused(["run", recipe, "--run_dir", tmp_path / "run", *words], capfd)
        assert str(data) in line and said in line
        assert not (tmp_path / "run").exists()


def test_run_refuses_recipes_and_test_sets_before_it_makes_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.en-de.en").write_text("a\nb\n")
    (tmp_path / "t.en-de.de").write_text("a\nb\nc\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    files = {"name": "t", "sources": str(tmp_path / "t.{pair}.{src}"), "references": str(tmp_path / "t.{pair}.{tgt}")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"test_sets": [{**files, "pairs": ["en-de"]}]}, "has 2 lines but"),
        ({"test_sets": [{**files, "pairs": ["de-en"]}]}, "test set `t` has no pair `de-en`"),
        ({"test_sets": [{"name": "toy", "kind": "tinyworld", "pairs": ["en-fr"]}]}, "has no pair `en-fr`"),
        ({"test_sets": [{**files, "pairs": ["en-de"], "references": None}]}, "no `references`"),
        ({"test_sets": [{**files, "pairs": ["en-de"], "sources": str(tmp_path / "empty")}]}, "empty"),
        ({"test_sets": [{**files, "pairs": ["en-de"], "kind": "file"}]}, "unknown kind `file`"),
        ({"decode__instruction_file": str(tmp_path / "empty")}, "empty"),
        ({"decode__instruction_file": "nothing.txt"}, "nothing.txt: no such file"),
        ({"model": {"model_name_or_path": str(tmp_path / "folder")}}, "no model there (config.json is missing)"),
        ({"data__template": "alpacca"}, "unknown template `alpacca`"),
        ({"arms__mle__objective": "mel"}, "arm `mle`"),
        ({"arms__convex__k": 0}, "arm `convex`"),
        ({"train__max_stpes": 3}, "did you mean `max_steps`?"),
    ]
    for changes, said in cases:
        recipe = write_recipe(tmp_path, recipe_with(**changes))
        for words in ([], ["--dry_run"]):
            if "references" in said and words:
                continue  # a plan says what is there
            assert said in refused(["run", recipe, "--run_dir", tmp_path / "run", *words], capfd)
            assert not (tmp_path / "run").exists()


def test_run_leaves_the_folders_of_others_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from convexlm.recipe import load_recipe
    from convexlm.runs import RunFolder

    recipe = write_recipe(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("important")
    RunFolder(tmp_path / "run").claim(load_recipe(recipe, ["seeds=[3]"]))
    (tmp_path / "file").write_text("important")
    before = snapshot(tmp_path)
    for folder, said in (
        ("theirs", "holds files but no recipe.yaml"),
        ("run", "belongs to another recipe: `seeds` is [3] there and [1, 2] here"),
        ("file", "is a file"),
        ("file/below", "cannot be used as a run folder"),
    ):
        for words in ([], ["--dry_run"]):
            if folder == "file/below" and words:
                continue
            assert said in refused(["run", recipe, "--run_dir", tmp_path / folder, *words], capfd)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: RECIPE.yaml"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
        (["tiny.yaml", "--dryrun"], "unknown option --dryrun; did you mean `--dry_run`?"),
        (["tiny.yaml", "--set", "train.max_stpes=3"], "did you mean `max_steps`?"),
        (["tiny.yaml", "--set", "nonsense"], "expected dotted.key=value"),
        (["tiny.yaml", "--set"], "--set: expected one argument"),
        (["."], "is a folder"),
    ],
)
def test_run_refuses_words_it_does_not_know(
    tmp_path: Path, words: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert said in refused(["run", *words], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_demo_refuses_a_seed_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "seeds" in refused(["demo", "--seed", "-1", "--run_dir", tmp_path / "run"], capfd)
    assert "--seed" in refused(["demo", "--seed", "one"], capfd)
    assert not (tmp_path / "run").exists()
