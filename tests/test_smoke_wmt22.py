"""Recipes on real files: the smoke recipe from end to end, and a dry run of every recipe."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from convexlm import cli
from pipeline_helpers import call

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAIRS = ("de-en", "en-de", "en-zh", "zh-en")


@pytest.fixture(scope="module")
def smoke(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("smoke")
    recipe = ROOT / "recipes" / "smoke-wmt22.yaml"
    done = call(["run", recipe, "--set", f"vars.data_dir={shared_data}", "--run_dir", "run", "--json"], home)
    assert done.returncode == 0, done.stderr
    (home / "result.json").write_text(done.stdout)
    return home


@pytest.mark.slow
def test_the_smoke_recipe_ends_with_scores_of_everything(smoke: Path) -> None:
    rows = [json.loads(line) for line in (smoke / "run" / "scores.jsonl").read_text().split("\n")[:-1]]
    found = {(row["pair"], row["arm"], row["checkpoint"], row["metric"]): row for row in rows}
    assert len(rows) == len(found)
    assert set(found) == {
        (pair, arm, f"checkpoint-{step}", metric)
        for pair in PAIRS
        for arm in ("mle", "convex")
        for step in (8, 16)
        for metric in ("bleu", "chrf")
    }
    for (pair, _, _, metric), row in found.items():
        assert math.isfinite(row["score"]) and 0 <= row["score"] <= 100
        assert row["num_sentences"] == 8 and row["search"] == "beam4" and row["test_set"] == "newstest22"
        assert "version:" in row["signature"] and "nrefs:1" in row["signature"]
        if metric == "bleu":
            assert f"tok:{'zh' if pair == 'en-zh' else '13a'}|" in row["signature"]


@pytest.mark.slow
def test_the_smoke_recipe_ends_with_a_comparison_and_a_report(smoke: Path) -> None:
    comparison = json.loads((smoke / "result.json").read_text())["comparison"]
    assert comparison["arms"] == ["mle", "convex"] and comparison["baseline"] == "mle"
    assert [corpus["pair"] for corpus in comparison["corpora"]] == list(PAIRS)
    assert set(comparison["checkpoints"].values()) == {"checkpoint-16"}
    assert len(comparison["paired"]) >= 4 * 2
    assert "<html" in (smoke / "run" / "report.html").read_text()


@pytest.mark.slow
def test_the_smoke_recipe_decodes_the_first_lines_as_they_are(smoke: Path, shared_data: Path) -> None:
    for pair in PAIRS:
        text = (shared_data / "wmt22" / f"newstest22.{pair}.{pair[:2]}").read_text(encoding="utf-8")
        files = sorted((smoke / "run" / "decode").glob(f"*/*/newstest22.{pair}.beam4.jsonl"))
        assert len(files) == 4
        for path in files:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            assert [row["source"] for row in rows] == text.split("\n")[:8]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_checked_without_weights_or_network(
    recipe: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import socket

    from sacrebleu.dataset import DATASETS

    def no_network(*args: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for folder in ("_outdir", "_rawdir"):
        monkeypatch.setattr(DATASETS["wmt22"], folder, str(tmp_path / folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    words = ["run", str(recipe), "--dry_run", "--json"]
    if recipe.stem == "summarization-cnn-dailymail":
        pytest.skip("its test set is a file that is not at hand; tests/test_recipes_shipped.py checks it with one")
    if recipe.stem.startswith("smoke"):
        words += ["--set", f"vars.data_dir={request.getfixturevalue('shared_data')}"]
    capfd.readouterr()
    code = cli.main(words)
    out, err = capfd.readouterr()
    assert code == 0, err
    assert not (tmp_path / "runs").exists()
    plan = json.loads(out)
    assert plan["recipe"] == recipe.stem and plan["dry_run"] is True
    assert plan["train"] and plan["decode"] and len(plan["outputs"]) == 3
    for train in plan["train"]:
        assert train["steps"] > 0 and train["checkpoints"][-1] == train["steps"] and train["records"] > 0


PAPERS = re.compile(r"llama-(7|13)b-(mle|convex)")


@pytest.mark.parametrize("recipe", [path for path in RECIPES if PAPERS.fullmatch(path.stem)], ids=lambda p: p.stem)
def test_the_references_settings_are_in_its_recipes(recipe: Path) -> None:
    from convexlm.recipe import load_recipe

    loaded = load_recipe(recipe)
    size = recipe.stem.split("-")[1]
    assert loaded.model["model_name_or_path"].endswith(f"llama-{size}")
    for arm in loaded.arms:
        options = arm.train
        assert (options["num_train_epochs"], options["learning_rate"]) == (3, 2e-5)
        assert (options["lr_scheduler_type"], options["warmup_steps"]) == ("cosine", 0.03)
        assert (options["global_batch_size"], options["max_length"], options["save_steps"]) == (128, 768, 200)
    assert [(test_set["name"], test_set["pairs"]) for test_set in loaded.test_sets] == [("wmt22", list(PAIRS))]
    (search,) = loaded.decode["searches"]
    assert search == {"num_beams": 4, "no_repeat_ngram_size": 12, "max_new_tokens": 256, "length_penalty": 1.0}
    if recipe.stem.endswith("convex"):
        assert loaded.arm("convex").train["objective"] == "convex" and loaded.baseline == "mle"
