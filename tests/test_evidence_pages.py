"""README and docs/evidence say what results/ holds, and the commands on their pages are those of the experiments."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "evidence"))

import appendix  # noqa: E402
import publish  # noqa: E402
import run as run_module  # noqa: E402
import summaries  # noqa: E402


@pytest.fixture(scope="module")
def published() -> publish.Published:
    return publish.Published(ROOT / "results")


@pytest.mark.parametrize("page", publish.pages(), ids=lambda page: page.name)
def test_every_table_is_what_results_say(page: Path, published: publish.Published) -> None:
    text = page.read_text(encoding="utf-8")
    assert published.refresh(text) == text, "run python benchmarks/evidence/publish.py"
    assert text.count("<!-- table:") == text.count("<!-- /table -->") == len(publish.MARKED.findall(text))


def test_a_wrong_number_on_a_page_is_mended(published: publish.Published) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    wrong = text.replace("| +1.58 / +0.77 |", "| +1.68 / +0.77 |", 1)
    assert wrong != text and published.refresh(wrong) == text


def test_every_tested_experiment_is_told_of(published: publish.Published) -> None:
    tested = {name for name, rows in published.rows.items() if any(row["stage"] == "final" for row in rows)}
    tested -= {name for name in tested if name.startswith("tinyworld-") or name.endswith("-trial")}  # on their pages
    assert tested <= set(published.experiments)
    assert tested == {row[1] for row in published.tables["all"]["rows"]}


def test_the_commands_of_the_appendix_are_taken_by_run(published: publish.Published) -> None:
    taken = 0
    for name, about in published.experiments.items():
        text = "\n".join(appendix.commands(name, about)).replace("\\\n", " ")
        for line in text.splitlines():
            if "evidence/run.py" in line:
                words = shlex.split(line, comments=True)
                args = run_module.parser().parse_args(words[words.index("benchmarks/evidence/run.py") + 1 :])
                assert (ROOT / args.recipe).is_file() and (ROOT / args.base_recipe).is_file()
                taken += 1
        assert f"WORK/{name} " in text or "validation only" in about["title"]
    assert taken > 0.8 * len(published.experiments)


def comparison(delta: float, sentences: tuple[float, float], seeds: tuple[float, float] | None) -> dict[str, Any]:
    return {"delta": delta, "delta_low": sentences[0], "delta_high": sentences[1], "seed_interval": seeds}


@pytest.mark.parametrize(
    ("sentences", "seeds", "sure"),
    [
        ((0.1, 0.5), (0.2, 0.4), True),
        ((-0.5, -0.1), (-0.4, -0.2), True),
        ((-0.1, 0.5), (0.2, 0.4), False),
        ((0.1, 0.5), (-0.2, 0.8), False),
        ((0.1, 0.5), None, True),  # one seed has no interval
    ],
)
def test_what_is_not_sure_is_marked(
    sentences: tuple[float, float], seeds: tuple[float, float] | None, sure: bool
) -> None:
    assert summaries.sure(comparison(0.3, sentences, seeds)) is sure


def test_a_cell_of_several_arms() -> None:
    rows = [
        {"system": f"{arm} {search}", "baseline": f"mle {search}", "metric": "bleu"} | comparison(delta, ends, None)
        for arm, delta, ends in (("a", 1.0, (0.5, 1.5)), ("b", -0.25, (-0.5, 0.1)))
        for search in ("greedy", "beam5")
    ]
    assert summaries.cell("a; k = 8: b", rows) == "+1.00 / +1.00 (k = 8: -0.25° / -0.25°)"
    assert summaries.cell("= 220", rows) == "220" and summaries.cell("", rows) == ""
    with pytest.raises(KeyError, match="c greedy"):
        summaries.cell("c", rows)


def test_how_many_rates_lie_at_an_edge() -> None:
    def row(stage: str, arm: str, rate: float) -> dict[str, Any]:
        return {"experiment": "toy", "arm": arm, "stage": stage, "learning_rate": rate, "selected": stage == "final"}

    rows = [row("tune", arm, rate) for arm in ("a", "b", "c") for rate in (1e-4, 3e-4, 1e-3)]
    rows += [row("final", "a", 1e-4), row("final", "b", 3e-4), row("final", "c", 1e-3)]
    assert "Of the 3 learning rates" in (text := appendix.at_the_edge(rows))
    assert "1 are the smallest" in text and "1 the largest" in text


def test_long_commands_are_folded_between_words_only() -> None:
    line = (
        appendix.RUN + ' --title "two words, which stay together" ' + " ".join(f"--option{n} {n}" for n in range(20))
    )
    folded = appendix.folded(line)
    assert len(folded) > 1 and all(len(part) <= 140 for part in folded)
    assert shlex.split(" ".join(part.removesuffix("\\") for part in folded)) == shlex.split(line)
    assert appendix.folded("x" * 300 + " y") == ["x" * 300 + " y"]  # the inside of a script
