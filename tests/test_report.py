"""The page that a run folder becomes: its scores and figures, its sentences, and hostile text in it."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from sacrebleu.metrics import CHRF

from convexlm.errors import UserError
from convexlm.report import write_report
from convexlm.report.data import read_run
from convexlm.report.sentences import read_sentences
from convexlm.report.text import script_json
from report_helpers import ARMS, HOSTILE, SCRIPT, Page, change, comparison_of, make_run, page_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True, size=12, n_samples=2)


# -- the page


def test_the_page_says_scores_differences_and_how_sure(report_run: Path, tmp_path: Path) -> None:
    page = page_of(report_run, tmp_path)
    for row in comparison_of(report_run)["table"]:
        assert f"{row['score']:.2f}" in page.text
        if row["delta"] is not None:
            assert f"{row['delta']:+.2f}" in page.text
            assert f"{row['delta_low']:+.2f} to {row['delta_high']:+.2f}".replace("-", "−") in page.text
        for value in row["by_seed"].values() if row["metric"] == "bleu" else []:
            assert f"{value:.2f}" in page.text
    for gap in comparison_of(report_run)["gaps"]:
        if gap["metric"] == "bleu":
            assert f"{gap['delta_low']:+.2f} to {gap['delta_high']:+.2f}".replace("-", "−") in page.text
    for pair in ("en-de", "en-zh"):
        assert pair in page.text
    assert "tok:zh" in page.text
    assert "tok:13a" in page.text
    assert "sacrebleu 2.6.0" in page.text
    assert "model_name_or_path: tiny" in page.text
    parts = [
        page.text.index(title)
        for title in ("Which objective is", "In every direction", "While training", "On which", "With which")
    ]
    assert parts == sorted(parts)


def test_the_page_loads_nothing(report_run: Path, tmp_path: Path) -> None:
    html = write_report(report_run, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert all((attrs["href"] or "").startswith("#") for _, attrs in page.tags if "href" in attrs)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "img")]
    assert "url(" not in html
    assert "@import" not in html


def test_the_same_files_give_the_same_page(report_run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(report_run, tmp_path / "elsewhere")
    for format_ in ("html", "md", "latex", "json"):
        first = write_report(report_run, tmp_path / "first", format=format_).read_bytes()
        assert write_report(moved, tmp_path / "second", format=format_).read_bytes() == first


def test_every_figure_is_there(report_run: Path, tmp_path: Path) -> None:
    titles = [attrs["aria-label"] for tag, attrs in page_of(report_run, tmp_path).tags if tag == "svg"]
    for wanted in (
        "BLEU over checkpoints, greedy search",
        "Negative log-likelihood over steps",
        "Mean weight of a sequence over steps",
        "Effective sample size over steps",
        "toy en-zh beam5",
        "Quality and decoding cost, BLEU",
    ):
        assert wanted in titles


def test_no_coordinate_is_nan_where_a_metric_is(report_run: Path, tmp_path: Path) -> None:
    html = write_report(report_run, tmp_path / "page.html").read_text(encoding="utf-8")
    for figure in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert "nan" not in figure.lower()
        assert "inf" not in figure.lower()


def test_a_curve_is_broken_where_a_value_is_missing(report_run: Path, tmp_path: Path) -> None:
    html = write_report(report_run, tmp_path / "page.html").read_text(encoding="utf-8")
    figure = next(f for f in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "likelihood over steps" in f)
    assert figure.count("<path") == 2 * len(ARMS) * 2  # arms x seeds, in two stretches each


def test_null_and_nan_in_the_comparison_become_dashes(report_copy: Path, tmp_path: Path) -> None:
    def edit(comparison: dict[str, Any]) -> None:
        for row in comparison["table"]:
            if row["metric"] == "chrf":
                row["score"] = math.nan
                row["delta"] = None
            if row["metric"] == "bleu" and row["arm"] == "convex-k3":
                row["delta_low"] = row["p_value"] = row["p_two_sided"] = row["p_holm"] = math.inf

    change(report_copy, edit)
    page = page_of(report_copy, tmp_path)
    assert "–" in page.text
    assert "nan" not in page.text.lower().split()
    json.loads(
        write_report(report_copy, tmp_path / "x", format="json").read_text(encoding="utf-8"),
        parse_constant=pytest.fail,
    )


def test_a_run_without_training_metrics_and_decode_files(report_copy: Path, tmp_path: Path) -> None:
    for path in report_copy.glob("train/*/metrics.jsonl"):
        path.unlink()
    next(report_copy.glob("decode/mle.seed2/checkpoint-200/*.jsonl")).unlink()
    page = page_of(report_copy, tmp_path)
    assert "no metrics.jsonl" in page.text
    assert "1 decode file is missing" in page.text
    assert -1 in [cell for item in json.loads(page.data)["items"] for cell in item[5]]


def test_one_arm_one_seed_has_scores_and_no_test(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", size=8, seeds=(1,), arms=("mle",), n_samples=5, steps=(50,))
    page = page_of(run, tmp_path)
    assert "nothing was tested" in page.text
    assert "mle: scores of one objective" in page.text


def test_outputs_and_lengths_are_in_the_page_and_in_markdown(report_run: Path, tmp_path: Path) -> None:
    text = write_report(report_run, tmp_path / "a.html").read_text(encoding="utf-8")
    comparison = json.loads((report_run / "comparison.json").read_text())
    row = comparison["outputs"][0]
    assert f"{row['length_ratio']:.3g}</td>" in text and "By length of the source" in text
    for part in comparison["by_length"]:
        assert f'<td class="num">{part["score"]:.2f}</td>' in text
    assert 'class="upright"' in text  # intervals of the checkpoints
    markdown = write_report(report_run, tmp_path / "a.md", format="md").read_text(encoding="utf-8")
    assert "### Outputs" in markdown and f"| {row['length_ratio']:.3f} |" in markdown


@pytest.mark.parametrize("on", ["test", "validation"])
def test_a_selection_is_said_and_one_on_the_test_set_in_red(report_run: Path, tmp_path: Path, on: str) -> None:

    shutil.copytree(report_run, tmp_path / "run")
    path = tmp_path / "run" / "comparison.json"
    comparison = json.loads(path.read_text())
    comparison["selection"] = {
        "on": on,
        "metric": "bleu",
        "search": "greedy",
        "chosen": comparison["checkpoints"],
    }
    path.write_text(json.dumps(comparison))
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    said = "selected on the test set itself" if on == "test" else "selected on the validation sets"
    assert said in text and ('class="lede warning"' in text) == (on == "test")
    markdown = write_report(tmp_path / "run", format="md").read_text(encoding="utf-8")
    assert said in markdown and ("WARNING: Checkpoints" in markdown) == (on == "test")
    assert said in write_report(tmp_path / "run", format="latex").read_text(encoding="utf-8")


# -- sentences


def test_sentence_scores_are_sacrebleus(report_run: Path) -> None:
    payload = read_sentences(read_run(report_run)).payload
    assert payload["arms"] == list(ARMS)
    items = payload["items"]
    assert len(items) == 80
    lines = (report_run / "decode/convex-k1.seed2/checkpoint-200/toy.en-zh.beam5.jsonl").read_text().splitlines()
    cell = (1 * 2 + 1) * 2 + 1  # arm convex-k1, search beam5, seed 2
    for line, item in zip(map(json.loads, lines), items[40:], strict=True):
        _, id_, source, references, texts, cells, scores, cut = item
        assert (id_, source) == (line["id"], line["source"])
        assert texts[cells[cell]] == line["hypothesis"]
        assert scores[cells[cell]] == round(CHRF().sentence_score(line["hypothesis"], references).score, 1)
        assert (cell in cut) == (line["finished"] is False)


def test_without_references_there_are_no_scores(report_copy: Path, tmp_path: Path) -> None:
    (report_copy / "data/references.jsonl").unlink()
    page = page_of(report_copy, tmp_path)
    assert "has no references" in page.text
    assert all(item[3] == [] and item[6] is None for item in json.loads(page.data)["items"])


def test_a_long_run_is_sampled_and_says_so(report_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = read_sentences(read_run(report_run))
    room = len(script_json(everything.payload["items"]).encode()) // 3
    book = read_sentences(read_run(report_run), room=room)
    assert 0 < book.shown < book.total == 80
    assert len(script_json(book.payload["items"]).encode()) <= room + 2

    def difference(item: list[Any]) -> float:
        values = [item[6][cell] for cell in item[5]]
        return max(abs(values[index] - values[index % 4]) for index in range(12))

    largest = max(everything.payload["items"], key=difference)
    assert difference(largest) == max(map(difference, book.payload["items"]))
    monkeypatch.setattr("convexlm.report.sentences.ROOM", room)
    monkeypatch.setattr("convexlm.report.sentences.read_sentences.__defaults__", (room,))
    assert f"{book.shown} of 80 sentences are on this page" in page_of(report_run, tmp_path).text


@pytest.mark.slow
def test_eight_thousand_sentences_stay_under_three_megabytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "large", size=4000, seeds=(1,), n_samples=2, steps=(100,))
    assert write_report(run).stat().st_size < 3_000_000


@pytest.mark.parametrize("what", ["hypotheses", "references"])
def test_sentences_that_are_not_those_of_the_scores_are_refused(report_copy: Path, what: str) -> None:
    path = report_copy / "data" / "references.jsonl"
    if what == "hypotheses":
        path = next(report_copy.glob("decode/mle.seed1/checkpoint-200/toy.en-de.greedy.jsonl"))
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("Haus", "Boot"), encoding="utf-8")
    with pytest.raises(UserError, match="has changed since it was scored"):
        write_report(report_copy)


def test_references_of_another_length_are_refused(report_copy: Path) -> None:
    path = report_copy / "data/references.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[1]["references"][0].pop()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match="toy en-zh has 39 references for 40 sources"):
        write_report(report_copy)


# -- hostile text


def test_hostile_text_is_data_and_nothing_else(hostile: Path, tmp_path: Path) -> None:
    raw = write_report(hostile, tmp_path / "page.html").read_bytes()
    html = raw.decode("utf-8")  # strictly: a lone surrogate would not be UTF-8
    assert b"\0" not in raw
    page = Page(html)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2
    assert SCRIPT not in html
    assert SCRIPT in page.text  # the recipe's description, as text
    assert not re.search("[\u2028\u2029\u202e\u2066]", html)
    texts = [item[4][item[5][8]] for item in json.loads(page.data)["items"][: len(HOSTILE)]]
    assert texts[0] == SCRIPT
    assert texts[2].startswith("xxxx")
    assert texts[2].endswith("[…96000 more characters]")
    assert texts[3:] == HOSTILE[3:]


def test_hostile_names_are_escaped_in_every_format(report_copy: Path, tmp_path: Path) -> None:
    evil = "<b>&_|`$\\\u202e\ud800"
    path = report_copy / "comparison.json"
    text = path.read_text(encoding="utf-8").replace('"toy-run"', json.dumps(evil)).replace('"toy"', json.dumps(evil))
    path.write_text(text, encoding="utf-8")
    page = page_of(report_copy, tmp_path)
    assert "<b>&_|`$\\⟨U+202E⟩⟨U+D800⟩" in page.text
    for format_ in ("md", "latex", "json"):
        written = write_report(report_copy, tmp_path / "out", format=format_).read_text(encoding="utf-8")
        assert "\u202e" not in written
    assert json.loads(written)["recipe"] == evil
