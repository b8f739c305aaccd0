"""COMET's files: written as `comet-score` reads them, and read back only onto the outputs that they are of."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from convexlm import cli
from convexlm.comet import import_comet, segments_file
from convexlm.errors import UserError
from convexlm.files import file_sha256, read_jsonl, text_sha256, write_jsonl
from convexlm.runs import RunFolder
from test_evaluation import Run

if TYPE_CHECKING:
    from pathlib import Path


def as_comet_reads(path: Path) -> list[str]:
    """How comet-score reads a text file."""
    with path.open(encoding="utf-8") as file:
        return [line.strip() for line in file.readlines()]


def score_like_comet(folder: Path, names: dict[str, float]) -> Path:
    """What `comet-score --to_json` writes for exported files, with a made-up score a system."""
    found: dict[str, Any] = {}
    for name, score in names.items():
        streams = {key: as_comet_reads(folder / f"{name}.{key}") for key in ("src", "mt", "ref")}
        rows = [dict(zip(streams, row, strict=True)) for row in zip(*streams.values(), strict=True)]
        found[f"{name}.mt"] = [row | {"COMET": score + 0.001 * at} for at, row in enumerate(rows)]
    path = folder / "scored.json"
    path.write_text(json.dumps(found, ensure_ascii=False, indent=4), encoding="utf-8")
    return path


@pytest.fixture
def made(tmp_path: Path) -> Run:
    run = Run(tmp_path, seeds=[1], compare={"n_samples": 20})
    run.write({("good", "greedy"): 0.2})
    run.evaluate()
    run.folder.recipe.write_text((tmp_path / "tiny.yaml").read_text())
    (tmp_path / "ref.txt").write_text("\n".join(run.test_sets[0].references[0]) + "\n", encoding="utf-8")
    return run


def export(run: Run, home: Path) -> None:
    for trained in run.runs:
        path = run.folder.decode(trained, "checkpoint-12", "t", "en-de", "greedy")
        words = ["--references", str(home / "ref.txt"), "--target_lang", "de", "--json"]
        words += ["--export_comet", str(home / f"{trained.arm}.jsonl")]
        assert cli.main(["score", "--hypotheses", str(path), *words]) == 0


def test_there_and_back(made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(made, tmp_path)
    exported = json.loads(capsys.readouterr().out.splitlines()[0])["comet"]
    assert exported["command"].startswith(f"comet-score -s {tmp_path}/good.src -t {tmp_path}/good.mt -r ")
    rows = list(read_jsonl(tmp_path / "mle.jsonl"))
    assert set(rows[0]) == {"src", "mt", "ref"}
    assert [row["mt"].strip() for row in rows] == as_comet_reads(tmp_path / "mle.mt")
    scored = score_like_comet(tmp_path, {"good": 0.8, "mle": 0.7})
    words = ["report", str(made.folder.path), "--comet", str(scored), "--comet_model", "Unbabel/wmt22-comet-da"]
    assert cli.main([*words, "--json"]) == 0
    added = json.loads(capsys.readouterr().out)["comet"]
    assert {(row["arm"], row["checkpoint"], row["search"]) for row in added} >= {
        ("good", "checkpoint-12", "greedy"),
        ("mle", "checkpoint-12", "greedy"),
    }
    good = next(row for row in added if row["arm"] == "good")
    assert good["score"] == pytest.approx(0.8 + 0.001 * 23 / 2)
    assert "model:Unbabel/wmt22-comet-da" in good["signature"]
    references = text_sha256(as_comet_reads(tmp_path / "good.ref"))
    assert good["references_sha256"] == [references] and good["json_sha256"] == file_sha256(scored)
    page = made.folder.report.read_text()
    assert "0.8115" in page and "COMET" in page
    assert "+0.1000 [+0.1000, +0.1000], p " in page  # every segment differs by as much
    # Twice gives no row twice; another evaluation of the same outputs keeps them, of other outputs does not.
    before = made.folder.scores.read_bytes()
    assert cli.main(words) == 0 and made.folder.scores.read_bytes() == before
    made.folder.comparison.unlink()
    made.evaluate()
    assert made.folder.scores.read_bytes() == before
    made.write({("good", "greedy"): 0.3})
    made.evaluate()
    left = [(r["arm"], r["search"]) for r in read_jsonl(made.folder.scores) if r["metric"] == "comet"]
    assert left == [("good", "beam2"), ("mle", "greedy"), ("mle", "beam2")]


def test_an_export_writes_over_nothing_but_an_export(
    made: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not over what it reads, and not over a file of another's that happens to have one of the four names."""
    hypotheses, sources = tmp_path / "a.jsonl", tmp_path / "news.src"
    shutil.copy(made.folder.decode(made.runs[0], "checkpoint-12", "t", "en-de", "greedy"), hypotheses)
    sources.write_text("".join(f"{row['source']}\n" for row in read_jsonl(hypotheses)), encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    words = ["score", "--hypotheses", str(hypotheses), "--references", str(tmp_path / "ref.txt")]
    words += ["--target_lang", "de", "--export_comet"]
    news = str(tmp_path / "news.jsonl")
    refused = (
        ([str(hypotheses)], "which is read here"),
        ([news, "--sources", str(sources)], "which is read here"),
        ([news], "is no earlier export"),
    )
    for more, said in refused:
        assert cli.main([*words, *more]) == 2
        assert said in capfd.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    for _ in range(2):
        assert cli.main([*words, str(tmp_path / "b.jsonl")]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "expected what `comet-score --to_json` writes"),
        ('{"a": []}', "no segments under `a`"),
        ('{"a": [{"src": "x", "mt": "y"}]}', "segment 1: needs the texts `src`, `mt` and a number `COMET`"),
        ('{"a": [{"src": "x", "mt": "y", "COMET": NaN}]}', "segment 1: needs the texts `src`, `mt` and a number"),
        ('{"a": [{"src": "x", "mt": "y", "COMET": 0.5}]}', "those of no decode file"),
        ("{", "not valid JSON"),
    ],
)
def test_what_is_no_score_of_this_run_is_refused(
    made: Run, tmp_path: Path, text: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(text)
    before = made.folder.scores.read_bytes()
    assert cli.main(["report", str(made.folder.path), "--comet", str(tmp_path / "bad.json")]) == 2
    assert said in capfd.readouterr().err
    assert made.folder.scores.read_bytes() == before


def test_plain_text_needs_its_sources(made: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["score", "--hypotheses", str(tmp_path / "ref.txt"), "--references", str(tmp_path / "ref.txt")]
    words += ["--target_lang", "de", "--export_comet", str(tmp_path / "x.jsonl")]
    assert cli.main(words) == 2
    assert "needs --sources FILE" in capfd.readouterr().err
    (tmp_path / "short.txt").write_text("one\n")
    assert cli.main([*words, "--sources", str(tmp_path / "short.txt")]) == 2
    assert "24" in capfd.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_a_blank_reference_is_none_as_in_the_scores(tmp_path: Path) -> None:
    for name, text in {"h": "a\nb\nc\n", "r1": "\nx\n \n", "r2": "y\nz\n\n"}.items():
        (tmp_path / name).write_text(text)
    files = {name: str(tmp_path / name) for name in ("h", "r1", "r2")}
    words = ["score", "--hypotheses", files["h"], "--references", files["r1"], files["r2"], "--target_lang", "de"]
    assert cli.main([*words, "--sources", files["h"], "--export_comet", str(tmp_path / "x.jsonl")]) == 0
    assert (tmp_path / "x.ref").read_text() == "y\nx\n\n"


# -- two sets of references for the same sentences


@pytest.fixture
def twofold(tmp_path: Path) -> RunFolder:
    """Outputs of one arm for the test sets `a` and `b`, which differ in their references alone."""
    folder = RunFolder(tmp_path / "run")
    sources, outputs = ["one ", "two", "three"], ["eins", " zwei", "drei"]
    rows = []
    for name in ("a", "b"):
        path = folder.path / "decode" / "mle" / "checkpoint-1" / f"{name}.en-de.greedy.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"source": s, "hypothesis": h}) + "\n" for s, h in zip(sources, outputs, strict=True))
        )
        about = {"arm": "mle", "seed": 1, "checkpoint": "checkpoint-1", "role": "test", "test_set": name}
        about |= {"pair": "en-de", "search": "greedy", "hypotheses_sha256": "same"}
        rows.append(about | {"metric": "chrf", "score": 50.0})
    write_jsonl(folder.scores, rows)
    streams = {"a": [["A1", "A2", "A3"]], "b": [["B1", "", " B3"], ["", "C2", "C3"]]}
    references = [{"test_set": name, "pair": "en-de", "references": streams[name]} for name in ("a", "b")]
    folder.data.mkdir()
    write_jsonl(folder.references, references)
    return folder


def segments(path: Path, references: list[str] | None, score: float) -> Path:
    rows = []
    for at, (source, output) in enumerate((("one", "eins"), ("two", "zwei"), ("three", "drei"))):
        row = {"src": source, "mt": output, "COMET": score + at}
        rows.append(row if references is None else row | {"ref": references[at]})
    path.write_text(json.dumps({"x": rows}))
    return path


def comets(folder: RunFolder) -> dict[str, float]:
    rows = [row for row in read_jsonl(folder.scores) if row["metric"] == "comet"]
    for row in rows:
        values = json.loads(segments_file(folder, row).read_text())
        assert sum(values) / len(values) == pytest.approx(row["score"])
    assert len({row["test_set"] for row in rows}) == len(rows)
    return {row["test_set"]: row["score"] for row in rows}


def test_a_score_goes_to_the_test_set_of_its_references(twofold: RunFolder, tmp_path: Path) -> None:
    of_a = segments(tmp_path / "a.json", ["A1", "A2", "A3"], 0.5)
    of_b = segments(tmp_path / "b.json", ["B1", "C2", "B3"], 0.1)  # of each segment the first with text
    assert [row["test_set"] for row in import_comet(twofold, [of_a])] == ["a"]
    assert comets(twofold) == {"a": 1.5}
    import_comet(twofold, [of_b])
    assert comets(twofold) == {"a": 1.5, "b": pytest.approx(1.1)}
    import_comet(twofold, [of_a, of_b, of_a])
    assert comets(twofold) == {"a": 1.5, "b": pytest.approx(1.1)}
    # A single stream of several is as good; a model that takes no references scores both.
    import_comet(twofold, [segments(tmp_path / "b.json", ["", "C2", "C3"], 0.3)])
    assert comets(twofold)["b"] == pytest.approx(1.3)
    import_comet(twofold, [segments(tmp_path / "kiwi.json", None, 0.0)])
    assert comets(twofold) == {"a": 1.0, "b": 1.0}


def test_other_references_and_two_scores_of_one_output_are_refused(twofold: RunFolder, tmp_path: Path) -> None:
    before = twofold.scores.read_bytes()
    with pytest.raises(UserError, match="a en-de or b en-de were scored against other references"):
        import_comet(twofold, [segments(tmp_path / "x.json", ["A1", "A2", "A4"], 0.5)])
    files = [segments(tmp_path / f"{score}.json", ["A1", "A2", "A3"], score) for score in (0.5, 0.6)]
    with pytest.raises(UserError, match=r"0\.6\.json: other scores of mle, a en-de, greedy were given before"):
        import_comet(twofold, files)
    assert twofold.scores.read_bytes() == before and not (twofold.path / "comet").exists()
