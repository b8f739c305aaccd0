"""The interactive page: its numbers against `theory`, in node and in a browser, and what people do with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest

from browser import Browser
from convexlm.objectives import get_objective
from convexlm.theory import optimum, render_page

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

D = [0.4, 0.3, 0.2, 0.1]


def block(page: str, name: str) -> str:
    return re.search(rf'<script[^>]* ?id="{name}">(.*?)</script>', page, re.S).group(1)


def cases() -> list[dict]:
    rng = np.random.default_rng(7)
    found = []
    for number in range(150):
        n = 1 + number % 8
        d = rng.dirichlet(np.full(n, rng.choice([0.3, 1.0, 5.0])))
        name = ["mle", "convex", "power"][number % 3]
        k = (
            rng.choice([0.05, 0.2, 0.3, 0.5, 0.8, 0.99, 1.0])
            if name == "power"
            else rng.choice([0.5, 1, 4.99, 5, 7, 30])
        )
        lengths = float(rng.choice([1, 5, 100])) if number % 2 else rng.choice([1.0, 3.0, 5.0, 20.0], n).tolist()
        settings = {
            "objective": name,
            "k": float(k),
            "level": str(rng.choice(["sequence", "sequence", "token"])),
            "lengthWeighting": str(rng.choice(["token", "sequence"])),
            "mleMix": float(rng.choice([0, 0, 0.1, 0.6, 1])),
        }
        found.append({"d": d.tolist(), "lengths": lengths, "settings": settings})
    for d, lengths, k in [
        (D, 10, 10.0),
        (D, 10, 9.999999999),
        ([0.45, 0.45, 0.1], 5, 5.0),
        ([0.45, 0.45, 0.1], 5, 6.0),
        ([0.5, 0, 0.5], [4, 2, 9], 3.0),
        ([0.3, 0.3, 0.4], [5, 5, 9], 5.0),
    ]:
        settings = {"objective": "convex", "k": k, "level": "sequence", "lengthWeighting": "token", "mleMix": 0}
        found.append({"d": d, "lengths": lengths, "settings": settings})
    return found


def expected(case: dict):
    s = case["settings"]
    names = {"level": s["level"], "length_weighting": s["lengthWeighting"], "mle_mix": s["mleMix"]}
    if s["objective"] != "mle":
        names["k"] = s["k"]
    return optimum(case["d"], case["lengths"], get_objective(s["objective"], **names))


def hold_to_theory(case: dict, got: dict) -> None:
    best = expected(case)
    assert got["probabilities"] == pytest.approx(best.probabilities, abs=1e-9), case
    assert got["entropy"] == pytest.approx(best.entropy, abs=1e-9), case
    assert got["modeMass"] == pytest.approx(best.mode_mass, abs=1e-9), case
    assert got["temperature"] == pytest.approx(best.temperature, abs=1e-12) if best.temperature is not None else True
    assert (got["method"], got["concave"]) == (best.method, best.concave), case
    assert (got["temperature"] is None) == (best.temperature is None), case


def test_the_page_computes_what_theory_does_in_node(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node at hand to run the page's computing block")
    everything = cases()
    (tmp_path / "compute.cjs").write_text(block(render_page(), "compute"), encoding="utf-8")
    (tmp_path / "cases.json").write_text(json.dumps(everything))
    (tmp_path / "run.cjs").write_text(
        "const theory = require('./compute.cjs'); const cases = require('./cases.json');"
        "const weights = [-9, -1, -0.01].map((m) => theory.weight({objective: 'power', k: 0.5, mleMix: 0.2}, m));"
        "console.log(JSON.stringify([cases.map((c) => theory.optimum(c.d, c.lengths, c.settings)), weights]));"
    )
    run = subprocess.run([node, tmp_path / "run.cjs"], capture_output=True, text=True, check=True, timeout=120)
    results, weights = json.loads(run.stdout)
    assert len(results) == len(everything)
    for case, got in zip(everything, results, strict=True):
        hold_to_theory(case, got)
    assert weights == pytest.approx([0.8 * (-m) ** -0.5 + 0.2 for m in (-9, -1, -0.01)], rel=1e-14)


def test_the_page_is_one_file_that_opens_as_asked() -> None:
    page = render_page([0.5, 0.25, 0.25], [3, 4, 5], "power", k=0.3, mle_mix=0.1, length_weighting="sequence")
    state = json.loads(block(page, "state"))
    assert state == {
        "choice": "power", "k": 0.3, "mix": 0.1, "weighting": "sequence", "d": [0.5, 0.25, 0.25], "T": [3, 4, 5]
    }  # fmt: skip
    assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "'unsafe-eval'" not in page
    assert json.loads(block(render_page(D, 5, "dft"), "state"))["choice"] == "token"


def test_what_the_page_cannot_show_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 26"):
        render_page(np.full(27, 1 / 27), 5)
    with pytest.raises(ValueError, match="lengths up to"):
        render_page(D, 20_000)
    with pytest.raises(ValueError, match="power` by token"):
        render_page(D, 5, "power", level="token")
    with pytest.raises(ValueError, match="sum to"):
        render_page([0.5], 5)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    path = tmp_path / "theory.html"
    path.write_text(render_page(D, 10, "convex", k=5.0), encoding="utf-8")
    browser.open(path)
    return browser


def numbers(page: Browser) -> list[list[str]]:
    rows = "[...document.querySelectorAll('#numbers tr')].map((r) => [...r.children].map((c) => c.textContent))"
    return page.evaluate(rows)


def put(page: Browser, control: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const e = document.querySelector({control!r}); e.value = {value!r};"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); })()"
    )


def column(page: Browser, number: int) -> list[float]:
    return [float(row[number]) for row in numbers(page)]


def test_in_a_browser_the_numbers_are_those_of_theory(page: Browser) -> None:
    some = cases()[::6] + cases()[-6:]
    script = f"{json.dumps(some)}.map((c) => ConvexTheory.optimum(c.d, c.lengths, c.settings))"
    for case, got in zip(some, page.evaluate(script), strict=True):
        hold_to_theory(case, got)
    assert column(page, 3) == pytest.approx(optimum(D, 10, k=5.0).probabilities, abs=1e-5)
    assert page.evaluate("document.getElementById('entropy-best').textContent") == "1.078 nats"
    assert page.evaluate("document.getElementById('temperature').textContent") == "0.5"
    assert (page.problems, len(page.requests)) == ([], 1)


def test_sliders_and_choices_change_the_optimum(page: Browser) -> None:
    put(page, "#k-number", "2")
    assert column(page, 3) == pytest.approx(optimum(D, 10, k=2.0).probabilities, abs=1e-5)
    put(page, "#T-number", "100")
    assert column(page, 3) == pytest.approx(optimum(D, 100, k=2.0).probabilities, abs=1e-5)
    put(page, "#mix-number", "0.5")
    assert column(page, 3) == pytest.approx(optimum(D, 100, k=2.0, mle_mix=0.5).probabilities, abs=1e-5)
    put(page, "#mix", "0")
    put(page, ".answer:nth-child(2) input", "3")
    put(page, "#weighting", "sequence")
    best = optimum(D, [100, 3, 100, 100], k=2.0, length_weighting="sequence")
    assert column(page, 3) == pytest.approx(best.probabilities, abs=1e-5)
    page.evaluate("document.querySelector('input[value=power]').click()")
    k = float(page.evaluate("document.getElementById('k-number').value"))
    best = optimum(D, [100, 3, 100, 100], "power", k=k, length_weighting="sequence")
    assert column(page, 3) == pytest.approx(best.probabilities, abs=1e-5)
    page.evaluate("document.querySelector('input[value=mle]').click()")
    assert page.evaluate("document.querySelector('#k').checkVisibility()") is False
    put(page, "#preset", "long tail")
    assert len(numbers(page)) == 8
    for _ in range(3):
        page.evaluate("document.getElementById('add').click()")
    page.evaluate("document.getElementById('remove').click()")
    assert len(numbers(page)) == 10
    assert sum(column(page, 2)) == pytest.approx(1, abs=1e-4)
    for k in ("-1", "", "0"):  # what is not sound changes nothing
        page.evaluate("document.querySelector('input[value=convex]').click()")
        put(page, "#k-number", k)
        assert np.isfinite(column(page, 3)).all()
    assert page.problems == []


def test_bars_by_keyboard_and_by_pointer(page: Browser) -> None:
    page.evaluate("document.querySelector('.track.data').focus()")
    for _ in range(5):
        page.press("ArrowUp")
    assert column(page, 2) == pytest.approx([0.45, 0.275, 0.55 / 3, 0.55 / 6], abs=1e-5)
    page.press("PageDown")
    assert column(page, 2)[0] == pytest.approx(0.35)
    page.press("End")
    assert column(page, 2) == pytest.approx([1, 0, 0, 0])
    page.press("ArrowDown")
    assert sum(column(page, 2)) == pytest.approx(1)
    page.press("Home")
    assert column(page, 2)[0] == 0
    box = page.evaluate(
        "(() => { const t = document.querySelectorAll('.track.data')[1]; t.scrollIntoView({block: 'center'});"
        "const b = t.getBoundingClientRect(); return [b.left + b.width / 2, b.top, b.height]; })()"
    )
    x, top, height = box
    for kind, at in [("mousePressed", 0.5), ("mouseMoved", 0.3), ("mouseReleased", 0.3)]:
        page.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=top + at * height, button="left", buttons=1, clickCount=1
        )
    assert column(page, 2)[1] == pytest.approx(0.7, abs=0.006)
    label = page.evaluate("document.querySelectorAll('[role=slider]')[1].getAttribute('aria-valuenow')")
    assert float(label) == pytest.approx(0.7, abs=0.006)
    assert page.problems == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_the_screen(page: Browser, width: int, theme: str) -> None:
    page.resize(width, 800, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (theme == "dark")


def test_the_address_holds_the_settings(page: Browser, tmp_path: Path) -> None:
    page.evaluate("location.hash = '#objective=power&k=0.2&T=7&d=0.5,0.3,0.2'")
    page.evaluate("dispatchEvent(new Event('hashchange'))")
    assert column(page, 3) == pytest.approx(optimum([0.5, 0.3, 0.2], 7, "power", k=0.2).probabilities, abs=1e-5)
    for hostile in (
        "#d=1,1",
        "#d=-1,2&T=0",
        "#k=NaN&mix=7&objective=__proto__",
        "#d=<img src=x onerror=alert(1)>",
        "#k=1e999",
    ):
        page.evaluate(f"location.hash = {hostile!r}")
        page.evaluate("dispatchEvent(new Event('hashchange'))")
        assert np.isfinite(column(page, 3)).all()
        assert len(numbers(page)) == 3
    assert page.problems == []
