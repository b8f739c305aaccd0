"""Files of hypotheses and references that go together, and those that only look as if they did."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest

from convexlm import cli
from convexlm.errors import UserError
from convexlm.segments import check_aligned, read_hypotheses, read_references, read_segments

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def records(path: Path, key: str, rows: list[tuple[object, str]], **fields: object) -> Path:
    lines = [json.dumps({"id": identity, key: text, **fields}) + "\n" for identity, text in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    texts = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(8)]
    rows = list(enumerate(texts))
    plain = tmp_path / "r.txt"
    plain.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return {
        "hyp": records(tmp_path / "h.jsonl", "hypothesis", rows),
        "reversed": records(tmp_path / "h2.jsonl", "hypothesis", rows[::-1]),
        "ref": records(tmp_path / "r.jsonl", "reference", rows),
        "turned": records(tmp_path / "r2.jsonl", "reference", rows[1:] + rows[:1]),
        "other": records(tmp_path / "r3.jsonl", "reference", [(f"x{n}", text) for n, text in rows]),
        "plain": plain,
    }


def score(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_the_same_ids_in_the_same_order_are_scored(files, capsys) -> None:
    for reference in ("ref", "plain"):
        code, out, _ = score(
            capsys,
            "score",
            "--hypotheses",
            files["hyp"],
            "--references",
            files[reference],
            "--target_lang",
            "en",
            "--json",
        )
        assert code == 0 and json.loads(out)["scores"][0]["score"] == pytest.approx(100)


@pytest.mark.parametrize(("reference", "said"), [("turned", "in another order"), ("other", "'x0' in ")])
def test_other_ids_are_refused_by_score(files, capsys, reference, said) -> None:
    code, out, err = score(
        capsys, "score", "--hypotheses", files["hyp"], "--references", files[reference], "--target_lang", "en"
    )
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "record 1: the id is '0' in " in err and said in err


def test_systems_in_another_order_are_refused_by_compare(files, capsys) -> None:
    words = ["compare", "--references", files["plain"], "--target_lang", "en", "--n_samples", 20, "--systems"]
    code, out, err = score(capsys, *words, f"a={files['hyp']}", f"b={files['reversed']}")
    assert code == 2 and out == "" and "in another order" in err
    code, _, _ = score(capsys, *words, f"a={files['hyp']}", f"b={files['hyp']}")
    assert code == 0


def test_other_sources_are_refused_too(tmp_path: Path) -> None:
    rows = [(0, "x"), (1, "y")]
    first = records(tmp_path / "a.jsonl", "hypothesis", rows, source="hello")
    second = records(tmp_path / "b.jsonl", "hypothesis", rows, source="goodbye")
    without = records(tmp_path / "c.jsonl", "hypothesis", rows)
    read = {path: read_segments(path, "hypothesis") for path in (first, second, without)}
    check_aligned([read[first], read[without]])
    with pytest.raises(UserError, match="the source is 'hello' in .*a.jsonl but 'goodbye' in .*b.jsonl"):
        check_aligned([read[first], read[without], read[second]])


def test_an_id_of_null_is_none(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text('{"id": null, "hypothesis": "a"}\n{"id": null, "hypothesis": "b"}\n')
    found = read_segments(tmp_path / "n.jsonl", "hypothesis")
    assert (found.texts, found.ids) == (["a", "b"], None)


def test_ids_count_only_where_every_record_has_one(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text('{"id": 1, "hypothesis": "a"}\n{"hypothesis": "b"}\n', encoding="utf-8")
    assert read_segments(path, "hypothesis").ids is None
    path.write_text('{"id": 1, "hypothesis": "a"}\n{"id": "1", "hypothesis": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="record 2: the id `1` is given twice"):
        read_segments(path, "hypothesis")


@pytest.mark.parametrize("name", ["h.JSONL", "h.jsonl.gz", "h.Jsonl.GZ"])
def test_json_lines_are_known_by_their_name_whatever_its_letters(files, tmp_path, name) -> None:
    raw = files["hyp"].read_bytes()
    path = tmp_path / "other" / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    assert read_hypotheses(path) == read_hypotheses(files["hyp"])


@pytest.mark.parametrize("name", ["h.ndjson", "h.txt", "h.jsonl.bak", "h"])
def test_records_under_another_name_are_not_scored_as_text(files, tmp_path, name) -> None:
    path = tmp_path / "other" / name
    path.parent.mkdir()
    path.write_bytes(files["hyp"].read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"its lines are JSON records with `hypothesis`; .* ends in \.jsonl"):
        read_hypotheses(path)


def test_json_that_is_the_answer_itself_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "h.txt"
    for lines in (['{"name": "Ada"}', "{}"], ['{"hypothesis": "a"}', "{torn"], ['{"hypothesis": 1}'], ["", "{"]):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        assert read_hypotheses(path) == lines == read_references(path)


def test_one_sentence_is_not_compared(tmp_path: Path, capsys) -> None:
    for name in ("a", "b", "r"):
        (tmp_path / name).write_text(f"a sentence {name}\n", encoding="utf-8")
    systems = [f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"]
    code, out, err = score(
        capsys, "compare", "--references", tmp_path / "r", "--target_lang", "en", "--systems", *systems
    )
    assert (code, out) == (2, "") and "there is only one" in err


def test_a_narrow_terminal_keeps_the_names(files, capsys, monkeypatch) -> None:
    from rich.console import Console

    from convexlm.verbs import compare

    args = compare.make_parser("convexlm compare").parse(
        ["--references", str(files["plain"]), "--target_lang", "en", "--n_samples", "20", "--systems"]
        + [f"convex_k1_long={files['hyp']}", f"mle={files['plain']}"]
    )
    result = compare.run(args)
    for width, lines in ((60, ["convex_k1_long"]), (140, ["convex_k1_long"])):
        compare.show(result, Console(width=width, highlight=False))
        out = capsys.readouterr().out
        assert all(line in out for line in lines)
        assert ("95 % interval" in out.split("\n")[0]) and out.split("\n")[0].count("95 % interval") == 1 + (
            width > 100
        )
