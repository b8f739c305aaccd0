"""The report's page in a real browser; skipped where there is none."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from browser import Browser
from convexlm.report import write_report
from report_helpers import HOSTILE, SCRIPT, make_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def plain(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "plain", n_samples=5)


@pytest.fixture(scope="module")
def hostile(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True, size=12, n_samples=2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


FIRST = "document.querySelector('#list > li').innerText"
COUNT = "document.getElementById('count').textContent"


def choose(browser: Browser, control: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const c = document.getElementById('{control}'); c.value = {json.dumps(value)};"
        f" c.dispatchEvent(new Event(c.id === 'filter' ? 'input' : 'change')); }})()"
    )


@pytest.mark.parametrize("name", ["plain", "hostile"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1180])
def test_opens_without_error_at_every_width(
    name: str, theme: str, width: int, browser: Browser, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = write_report(request.getfixturevalue(name), tmp_path / "page.html")
    browser.open(path, width=width, theme=theme)
    for order in ("gain", "loss", "low", "order"):
        choose(browser, "sort", order)
        browser.evaluate("document.getElementById('more').click()")
    assert browser.problems == []
    assert browser.requests == [path.resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (theme == "dark")


def test_sorting_filter_and_direction_change_what_is_shown(plain: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(plain, tmp_path / "page.html"))
    gains = browser.evaluate("[...document.querySelectorAll('.head b')].map((b) => b.textContent)")
    values = [float(text.replace("−", "-")) for text in gains]
    assert values == sorted(values, reverse=True)
    most = browser.evaluate(FIRST)
    choose(browser, "sort", "loss")
    assert browser.evaluate(FIRST) != most
    choose(browser, "corpus", "0")
    assert "that fit" in browser.evaluate(COUNT)
    assert "20 shown of 40" in browser.evaluate(COUNT)
    assert "en-de" in browser.evaluate(FIRST)
    source = json.loads((plain / "decode/mle.seed1/checkpoint-200/toy.en-de.greedy.jsonl").read_text().split("\n")[7])
    choose(browser, "filter", source["source"].upper())
    assert "1 shown of 1" in browser.evaluate(COUNT)
    assert source["hypothesis"] in browser.evaluate(FIRST)
    assert browser.evaluate("document.querySelectorAll('#list mark').length") > 0
    choose(browser, "filter", "no such text anywhere")
    assert "No sentence" in browser.evaluate(COUNT)


def test_marks_are_the_words_that_differ(plain: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(plain, tmp_path / "page.html"))
    choose(browser, "marks", "reference")
    choose(browser, "corpus", "0")
    browser.evaluate("document.getElementById('more').click()")
    # Without its marks, what is left of a hypothesis are words of the reference in their order.
    found = browser.evaluate(
        """[...document.querySelectorAll('#list > li')].map((li) => ({
          reference: li.querySelector('.reference').textContent,
          rest: [...li.querySelectorAll('.hypothesis')].map((dd) => [...dd.childNodes]
            .filter((n) => n.nodeName !== 'MARK' && !n.className).map((n) => n.textContent).join(''))
        }))"""
    )
    assert len(found) == 40
    for item in found:
        words = re.findall(r"\w+", item["reference"])
        for rest in item["rest"]:
            left = iter(words)
            assert all(word in left for word in re.findall(r"\w+", rest))


def test_hostile_text_is_shown_as_text(hostile: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(hostile, tmp_path / "page.html"))
    choose(browser, "sort", "order")
    shown = browser.evaluate(
        "[...document.querySelectorAll('#list > li')].map((li) => li.querySelectorAll('.hypothesis')[2].textContent)"
    )
    assert shown[0].startswith(SCRIPT)
    assert shown[1].startswith(HOSTILE[1])
    assert "x" * 4000 in shown[2]
    assert "lone U+D800 surrogate" in shown[3]
    assert "U+0000" in shown[4]
    assert "U+202E" in shown[5]
    assert shown[7] == "empty"
    assert shown[8].startswith(HOSTILE[8])
    assert browser.evaluate("document.querySelectorAll('#list script, #list img').length") == 0
    assert browser.problems == []


def test_works_with_the_keyboard_alone(plain: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(plain, tmp_path / "page.html"))
    where = "[...document.querySelectorAll('#list > li')].indexOf(document.activeElement)"
    for expected in (0, 1, 2):
        browser.press("j")
        assert browser.evaluate(where) == expected
    browser.press("k")
    assert browser.evaluate(where) == 1
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "filter"
    browser.press("j")
    assert browser.evaluate("document.activeElement.value") == "j"
    browser.press("Escape")
    assert browser.evaluate("document.activeElement.value") == ""
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "differ"


def test_prints_without_controls(plain: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(plain, tmp_path / "page.html"))
    browser.resize(794, 1123, media="print")
    assert browser.evaluate("getComputedStyle(document.getElementById('controls')).display") == "none"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 794
