"""A small run folder, made without a model: invented hypotheses, scored by the real `evaluate`; and its page."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from random import Random
from typing import TYPE_CHECKING, Any

import yaml

from convexlm.evaluation import evaluate
from convexlm.files import write_jsonl
from convexlm.recipe import Arm, Recipe
from convexlm.report import write_report
from convexlm.runs import RunFolder, trained_runs
from convexlm.testsets import TestSet

if TYPE_CHECKING:
    from pathlib import Path

ARMS = {"mle": 0.32, "convex-k1": 0.2, "convex-k3": 0.12}  # the share of words that come out wrong at greedy search
SEARCHES = {"greedy": 1.0, "beam5": 0.75}
PAIRS = ("en-de", "en-zh")
WORDS = {
    "en": "the old house small bird sees a green tree near river and sings in morning light of town",
    "de": "das alte Haus kleiner Vogel sieht einen grünen Baum am Fluss und singt im Morgenlicht der Stadt",
    "zh": " ".join("老房子小鸟看见绿树在河边早晨的阳光里唱歌城市"),
}
SCRIPT = "<script>alert(1)</script>"
# One after another, these replace the first hypotheses of an arm.
HOSTILE = [
    SCRIPT,
    "</script><img src=x onerror=alert(2)>",
    "x" * 100_000,
    "lone \ud800 surrogate",
    "nul \x00 and bell \x07",
    "bidi \u202egnisrever\u2066",
    "two\u2028lines\u2029or three",
    "",
    "<!-- <script> ]]> &amp; \"quotes\" 'single' {{ 7 * 7 }}",
]


def make_run(
    folder: Path,
    *,
    size: int = 40,
    seeds: tuple[int, ...] = (1, 2),
    arms: tuple[str, ...] = tuple(ARMS),
    references: bool = True,
    hostile: bool = False,
    steps: tuple[int, ...] = (100, 200),
    n_samples: int = 60,
) -> Path:
    """Write a whole run folder; the same arguments give the same files."""
    test_sets = [_test_set(pair, size) for pair in PAIRS]
    recipe = _recipe(seeds, arms, n_samples, steps)
    run_folder = RunFolder(folder)
    runs = trained_runs(recipe)
    folder.mkdir(parents=True)
    versions = {"convexlm": "0.1.0", "sacrebleu": "2.6.0"}
    run_folder.recipe.write_text(
        yaml.safe_dump({**recipe.resolved, "versions": versions}, sort_keys=False), encoding="utf-8"
    )
    for run in runs:
        train = run_folder.train(run)
        train.mkdir(parents=True)
        names = [f"checkpoint-{step}" for step in steps]
        (train / "done.json").write_text(json.dumps({"identity": "x", "checkpoints": names}), encoding="utf-8")
        _write_metrics(train / "metrics.jsonl", run.arm, run.seed, steps[-1])
        for name in names:
            for test_set in test_sets:
                for search in SEARCHES:
                    path = run_folder.decode(run, name, test_set.name, test_set.pair, search)
                    late = name == names[-1]
                    share = ARMS[run.arm] * SEARCHES[search] * (1.0 if late else 1.6)
                    bad = HOSTILE if hostile and run.arm == arms[-1] and late else []
                    _write_decode(path, test_set, share, f"{run.name}{name}{search}", bad)
    if references:
        rows = [{"test_set": t.name, "pair": t.pair, "references": t.references} for t in test_sets]
        write_jsonl(run_folder.data / "references.jsonl", rows)
    evaluate(recipe, run_folder, runs, test_sets)
    return folder


class Page(HTMLParser):
    """What a browser's parser makes of a page: its tags, its visible text, its embedded data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data += data
        elif not self._inside:
            self.text += data


def page_of(run: Path, tmp_path: Path) -> Page:
    return Page(write_report(run, tmp_path / "page.html").read_text(encoding="utf-8"))


def comparison_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "comparison.json").read_text(encoding="utf-8"))


def change(run: Path, edit: Any) -> None:
    comparison = comparison_of(run)
    edit(comparison)
    (run / "comparison.json").write_text(json.dumps(comparison), encoding="utf-8")


def _recipe(seeds: tuple[int, ...], arms: tuple[str, ...], n_samples: int, steps: tuple[int, ...]) -> Recipe:
    compare = {"baseline": arms[0], "n_samples": n_samples, "seed": 12345}
    decode: dict[str, Any] = {"searches": [{"num_beams": 1}, {"num_beams": 5}], "checkpoints": list(steps)}
    data = {"dataset": "data/alpaca.json", "template": "alpaca"}
    test_sets = ({"name": "toy", "pairs": list(PAIRS)},)
    resolved = {
        "name": "toy-run",
        "description": f"invented, with {SCRIPT} in it",
        "seeds": list(seeds),
        "model": {"model_name_or_path": "tiny"},
        "data": data,
        "arms": {arm: {"objective": arm.split("-")[0]} for arm in arms},
        "test_sets": list(test_sets),
        "decode": decode,
        "score": {"metrics": ["bleu", "chrf"]},
        "compare": compare,
    }
    return Recipe(
        name="toy-run",
        resolved=resolved,
        arms=tuple(Arm(arm, {}) for arm in arms),
        seeds=seeds,
        model=resolved["model"],
        data=data,
        test_sets=test_sets,
        decode=decode,
        metrics=("bleu", "chrf"),
        compare=compare,
    )


def _sentence(random: Random, lang: str) -> list[str]:
    return [random.choice(WORDS[lang].split()) for _ in range(random.randint(8, 16))]


def _joined(words: list[str], lang: str) -> str:
    return "".join(words) + "。" if lang == "zh" else " ".join(words) + "."


def _test_set(pair: str, size: int) -> TestSet:
    source, target = pair.split("-")
    random = Random(f"{pair} sources")
    sources = [_joined(_sentence(random, source), source) for _ in range(size)]
    stream = [_joined(_sentence(random, target), target) for _ in range(size)]
    return TestSet("toy", pair, sources, [stream], [str(index) for index in range(size)], {"kind": "files"})


def _write_decode(path: Path, test_set: TestSet, share: float, name: str, bad: list[str]) -> None:
    target = test_set.pair.split("-")[1]
    random = Random(name)
    rows = []
    for index, (source, reference) in enumerate(zip(test_set.sources, test_set.references[0], strict=True)):
        words = list(reference[:-1]) if target == "zh" else reference[:-1].split()
        words = [random.choice(WORDS[target].split()) if random.random() < share else word for word in words]
        text = bad[index] if index < len(bad) else _joined(words, target)
        row = {"id": str(index), "source": source, "hypothesis": text, "log_prob": -1.5, "tokens": len(words)}
        rows.append(row | {"finished": index % 17 != 3})
    write_jsonl(path, rows)
    meta = {"cut": 2, "seconds": 0.8 if "greedy" in path.name else 3.1, "num_sentences": len(rows)}
    path.with_suffix(".meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _write_metrics(path: Path, arm: str, seed: int, steps: int) -> None:
    random = Random(f"{arm} {seed}")
    rows: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        nll = 2.0 + 4.0 * math.exp(-step / 60) + ARMS[arm] + random.gauss(0, 0.05)
        weight = 1.0 if arm == "mle" else math.exp(-nll / 4)
        rows.append(
            {"step": step, "loss": nll, "nll": nll, "weight_mean": weight, "effective_sample_size": weight**0.3}
        )
    rows[3]["nll"] = float("nan")
    rows[4]["weight_mean"] = None
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write('{"step": 2')  # torn
