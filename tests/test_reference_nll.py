"""Scores by how unlikely the references are under the model that training started from."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import convexlm.reference_nll as module
from convexlm.parts import scores_in_parts
from convexlm.reference_nll import reference_nll
from convexlm.templates import TRANSLATION_INSTRUCTION, fill_instruction, get_template
from diagnosis_helpers import make_checkpoint
from test_evaluation import SIZE, Run
from training_helpers import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

MODEL = {"model_name_or_path": "base"}


def spell(seed: int, longest: int) -> list[str]:
    chance = Random(seed)
    return [" ".join(f"w{chance.randrange(30)}" for _ in range(chance.randint(1, longest))) for _ in range(SIZE)]


def make(home: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Run:
    home.mkdir(exist_ok=True)
    make_checkpoint(home / "base")
    monkeypatch.chdir(home)
    run = Run(home, model=MODEL, data={"dataset": "unused.jsonl"}, **{"seeds": [1], **changes})
    run.test_sets[0].sources[:] = spell(1, 6)
    run.test_sets[0].references[0][:] = spell(2, 9)
    return run


def by_hand(run: Run, base: Path, seed_of_model: int = 0) -> list[float]:
    """The same in float64, a sentence at a time, through the whole model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval(), tiny_tokenizer()
    instruction = fill_instruction(TRANSLATION_INSTRUCTION, "en-de")
    found = []
    for source, reference in zip(run.test_sets[0].sources, run.test_sets[0].references[0], strict=True):
        prompt = get_template("alpaca").fill({"instruction": instruction, "input": source})
        start = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        answer = [*tokenizer(reference, add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + answer])).logits[0].log_softmax(-1)
        own = [logits[len(start) - 1 + at, token].item() for at, token in enumerate(answer)]
        found.append(-sum(own) / len(own))
    return found


def test_references_are_measured_under_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, monkeypatch)
    found = reference_nll(run.recipe, run.folder, run.test_sets)
    assert found.base == "base" and found.reason is None and list(found.values) == [("t", "en-de", 1)]
    assert found.values["t", "en-de", 1] == pytest.approx(by_hand(run, tmp_path / "base"), abs=2e-5)
    # The second time nothing is loaded; another base model's numbers are not taken for this one's.
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("the model was loaded again"))
    assert reference_nll(run.recipe, run.folder, run.test_sets).values == found.values
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base", seed=5)
    other = reference_nll(run.recipe, run.folder, run.test_sets)
    assert other.values["t", "en-de", 1] == pytest.approx(by_hand(run, tmp_path / "base"), abs=2e-5)
    assert other.values != found.values


def test_a_comparison_scores_the_quarters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, monkeypatch)
    run.write({("good", "greedy"): 0.5})
    comparison = run.evaluate()
    values = np.array(by_hand(run, tmp_path / "base"))
    rows = [r for r in comparison["by_reference_nll"] if (r["search"], r["arm"]) == ("greedy", "good")]
    assert [row["bucket"] for row in rows] == [0, 1, 2, 3] and sum(row["num_sentences"] for row in rows) == SIZE
    order = np.sort(values)
    assert rows[0]["low"] == pytest.approx(order[0], abs=1e-4)
    assert rows[3]["high"] == pytest.approx(order[-1], abs=1e-4)
    assert all(a["high"] < b["low"] for a, b in zip(rows, rows[1:], strict=False))
    assert comparison["reference_nll"] == {"base": "base", "reason": None}


def test_with_an_arm_to_start_from_every_seed_has_its_own_ruler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"base": {"objective": "mle", "decode": False}, "mle": {"objective": "mle", "init_from": "base"}}
    arms["good"] = {"objective": "convex", "k": 1.0, "init_from": "base"}
    run = make(tmp_path, monkeypatch, seeds=[1, 2], arms=arms)
    for seed in (1, 2):
        make_checkpoint(run.folder.path / "train" / f"base.seed{seed}" / "checkpoint-12", seed=seed)
    found = reference_nll(run.recipe, run.folder, run.test_sets)
    for seed in (1, 2):
        wanted = by_hand(run, run.folder.path / "train" / f"base.seed{seed}" / "checkpoint-12")
        assert found.values["t", "en-de", seed] == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compare": {"reference_nll": False}}, "reference_nll: false"),
        ({"model": {"config": {"model_type": "llama"}}}, "new model"),
        ({"model": {"model_name_or_path": "nowhere"}}, "`nowhere` is not at hand"),
    ],
)
def test_where_there_is_no_ruler_the_reason_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path, seeds=[1], **{"model": MODEL, **changes})
    run.write()
    comparison = run.evaluate()
    assert comparison["by_reference_nll"] == [] and reason in comparison["reference_nll"]["reason"]


def test_a_reference_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, monkeypatch)
    run.test_sets[0].references[0][3] = " ".join(["w1"] * 200)  # the model has 128 positions
    run.write()
    comparison = run.evaluate()
    (file,) = run.folder.data.glob("reference_nll.*.json")
    assert [at for at, value in enumerate(json.loads(file.read_text())["nll"]) if value is None] == [3]
    rows = [r for r in comparison["by_reference_nll"] if (r["search"], r["arm"]) == ("greedy", "mle")]
    assert sum(row["num_sentences"] for row in rows) == SIZE - 1


def test_the_first_reference_that_a_sentence_has_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, monkeypatch)
    first, second = run.test_sets[0].references[0], spell(3, 9)
    wanted = by_hand(run, tmp_path / "base")
    run.test_sets[0].references.append(second)
    first[3], first[5], second[5], second[0] = "", " ", "", ""
    run.write()
    run.evaluate()
    (file,) = run.folder.data.glob("reference_nll.*.json")
    found = json.loads(file.read_text())["nll"]
    assert found.pop(5) is None
    first[:] = [mine if mine.strip() else other for mine, other in zip(first, second, strict=True)]
    assert found[3] == pytest.approx(by_hand(run, tmp_path / "base")[3], rel=1e-4)
    kept = [value for at, value in enumerate(found) if at != 3]
    assert kept == pytest.approx([value for at, value in enumerate(wanted) if at not in (3, 5)], rel=1e-4)


def test_equal_values_are_one_part(tmp_path: Path) -> None:
    run = Run(tmp_path, seeds=[1])
    run.write()
    run.evaluate()
    from convexlm.decoded import read_decoded

    decoded = read_decoded(
        run.recipe, run.folder, run.runs, run.test_sets, {r.name: "checkpoint-12" for r in run.runs}
    )
    final = [entry for entry in decoded if entry.checkpoint == "checkpoint-12"]
    rows = scores_in_parts(final, ["mle"], ["greedy"], ["bleu"], lambda _: np.ones(SIZE))
    assert [(row["bucket"], row["num_sentences"], row["metric"]) for row in rows] == [(0, SIZE, "bleu")]
    nothing = scores_in_parts(final, ["mle"], ["greedy"], ["bleu"], lambda _: np.full(SIZE, np.nan))
    assert nothing == []
