"""What a model card says of the training: the objective that was minimised, and what was trained before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from convexlm.card_objective import objective_lines, objective_of
from convexlm.errors import UserError
from convexlm.model_card import write_card
from convexlm.objectives import get_objective


def said(training: dict[str, Any] | None = None, **objective: Any) -> str:
    lines = objective_lines(get_objective(**objective).to_dict(), training or {})
    assert lines[:2] == ["## Objective", ""]
    return lines[2]


def test_each_formula_is_the_one_that_is_minimised() -> None:
    import torch

    cases: list[dict[str, Any]] = [
        {"name": "mle"},
        {"name": "convex", "k": 2.0},
        {"name": "convex", "k": 2.0, "mle_mix": 0.1},
        {"name": "power", "k": 0.5, "mle_mix": 0.25},
        {"name": "dft"},
    ]
    for case in cases:
        objective = get_objective(**case)
        written = said(**case).split("`")[3]
        code = written.replace("^", "**").replace(" (", " * (").replace("/ * (", "/ (").replace("k m", "k * m")
        code = code.replace("- * (", "- (").replace("+ * (", "+ (")
        for m in (-0.2, -1.7):
            found = eval(
                code, {"exp": lambda x: torch.tensor(x).exp().item(), "m": m, "k": getattr(objective, "k", 0)}
            )
            assert found == pytest.approx(float(objective.mixed_value(torch.tensor(m))), rel=1e-5), written


def test_what_m_is_and_how_answers_count() -> None:
    assert "m is the mean log-probability of an answer's tokens" in said(name="convex")
    assert "An answer counts by its number of tokens." in said(name="convex")
    assert "All answers count the same." in said(name="convex", length_weighting="sequence")
    token = said(name="convex", k=2.0, level="token")
    assert "m is each target token's log-probability" in token and "mean log-probability" not in token
    assert "All target tokens count the same." in token and "DFT" not in token
    assert "by the mean over its tokens" in said(name="convex", level="token", length_weighting="sequence")
    for dft in (said(name="dft"), " ".join(objective_lines(objective_of({"objective": "dft"}), {}))):
        assert "each target token's" in dft and "mean log-probability" not in dft and "k = 1" in dft
    assert "DFT" in said(name="dft")
    assert "parabola" in said(name="power") and "parabola" not in said(name="convex")


def test_what_training_did_to_the_objective() -> None:
    assert "e = 0.1" in said({"label_smoothing_factor": 0.1}, name="mle")
    assert "NEFTune, alpha = 5" in said({"neftune_noise_alpha": 5}, name="mle")
    assert "first 10 % of the training steps" in said({"k_warmup": 0.1}, name="power")
    assert "training steps" not in said({"k_warmup": 0.1}, name="mle")
    plain = said({"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "k_warmup": 0}, name="convex")
    assert not any(word in plain for word in ("smoothed", "NEFTune", "training steps"))
    assert objective_lines({}, {}) == [] and objective_of({"k": 2}) == {}


def card(tmp_path: Path, arm: str, *, marker: dict[str, Any] | None = None, **recipe: Any) -> str:
    run = tmp_path / "run"
    checkpoint = run / "train" / arm / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": "run", "seeds": [1], **recipe}))
    out = tmp_path / "out"
    out.mkdir()
    (out / "convexlm.json").write_text(json.dumps(marker or {}))
    write_card(
        out,
        checkpoint=checkpoint,
        run_dir=None,
        kind="plain",
        parameters=1000,
        dtype="float32",
        base_model=None,
        license_name=None,
        name="out",
    )
    return " ".join((out / "README.md").read_text().split("---\n", 2)[2].split())


ARMS = {
    "mle": {"objective": "mle", "max_steps": 600, "label_smoothing_factor": 0.1, "dataset": "some/corpus"},
    "dft": {"objective": "dft", "init_from": "mle"},
    "convex": {"objective": "convex", "k": 2.0, "init_from": "dft", "max_steps": 4},
}


def test_what_was_trained_before_is_told(tmp_path: Path) -> None:
    train = {"learning_rate": 1e-5, "neftune_noise_alpha": 5}
    model = {"model_name_or_path": "some/base"}
    text = card(tmp_path, "convex", arms=ARMS, train=train, model=model, data={"dataset": "other/corpus"})
    assert (
        "fine-tuned of `some/base` first with the `mle` objective, then with the `dft` objective, then with the "
        "`convex` objective by convexlm, at step 4 of the last training" in text
    )
    _, before = text.split("## Trained before")
    first, second = before.split("- `dft`")
    assert "- `mle`, with the `mle` objective: dataset = some/corpus" in first and "max_steps = 600" in first
    assert "label_smoothing_factor = 0.1" in first and "label_smoothing_factor" not in second
    assert "k = 1.0" in second and "dataset = other/corpus" in second
    assert "NEFTune" in text.split("## Trained before")[0] and "| neftune_noise_alpha | 5 |" in text
    assert "smoothed" not in text.split("## Trained before")[0]


def test_a_first_training_has_nothing_before_it(tmp_path: Path) -> None:
    model = {"config": {"model_type": "llama"}}
    text = card(tmp_path, "mle", arms=ARMS, model=model, marker={"objective": get_objective("mle").to_dict()})
    assert (
        "A causal language model trained from random weights with the `mle` objective by convexlm, at step 4:" in text
    )
    assert "Trained before" not in text and "| label_smoothing_factor | 0.1 |" in text and "e = 0.1" in text


def trained_alone(folder: Path, **marker: Any) -> Path:
    """A checkpoint that is in no run folder."""
    folder.mkdir(parents=True)
    (folder / "convexlm.json").write_text(json.dumps(marker))
    return folder


def written(tmp_path: Path, checkpoint: Path, run_dir: Path | None = None) -> str:
    out = tmp_path / "written"
    out.mkdir()
    (out / "convexlm.json").write_text((checkpoint / "convexlm.json").read_text())
    told = {"kind": "plain", "parameters": 1, "dtype": "float32", "base_model": None, "license_name": None}
    write_card(out, checkpoint=checkpoint, run_dir=run_dir, name="out", **told)  # type: ignore[arg-type]
    return (out / "README.md").read_text()


def test_without_a_recipe_the_checkpoint_says_how_it_was_trained(tmp_path: Path) -> None:
    text = written(
        tmp_path,
        trained_alone(
            tmp_path / "mine" / "checkpoint-4",
            objective=get_objective("convex", k=2.0).to_dict(),
            training={
                "label_smoothing_factor": 0.1,
                "k_warmup": 0.2,
                "neftune_noise_alpha": None,
                "global_batch": 128,
                "model": {"name": "some/base@v2", "content": "x"},
                "dataset": {"name": "d.jsonl", "content": "x"},
                "max_records": 1500,
            },
            optimizer={"learning_rate": 2e-5, "weight_decay": 0.0},
        ),
    )
    assert "Labels were smoothed by e = 0.1" in text and "first 20 % of the training steps" in text
    assert "| learning_rate | 2e-05 |" in text and "| global_batch_size | 128 |" in text
    assert "NEFTune" not in text and "weight_decay" not in text
    assert "fine-tuned of `some/base` with" in text and "`d.jsonl`, its first 1,500 records." in text


def test_a_named_run_folder_must_have_the_run_of_the_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    row = {"arm": "mle", "checkpoint": "checkpoint-4", "test_set": "wmt22", "pair": "en-de", "search": "greedy"}
    rows = [{**row, "seed": seed, "metric": "bleu", "score": 20.0 + seed} for seed in (1, 2)]
    (run / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    recipe = {"name": "run", "seeds": [1, 2], "arms": ARMS}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("best", "mle", "mle.seed3"):
        checkpoint = trained_alone(tmp_path / name / "checkpoint-4")
        with pytest.raises(UserError, match=rf"its folder \(`{name}`\) must be called as the run is"):
            written(tmp_path / name, checkpoint, run)
    text = written(tmp_path, trained_alone(tmp_path / "mle.seed2" / "checkpoint-4"), run)
    assert "22.00" in text and "21.00" not in text


def test_scores_are_written_as_the_report_writes_them(tmp_path: Path) -> None:
    checkpoint = trained_alone(tmp_path / "run" / "train" / "mle" / "checkpoint-4")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"name": "run", "seeds": [1], "arms": ARMS}))
    row = {"arm": "mle", "checkpoint": "checkpoint-4", "test_set": "tiny", "pair": "en-de", "search": "greedy"}
    scores = {"mode_share": 0.87654, "comet": 0.84123, "chrf++": 51.236, "bleu": float("nan"), "ter": True}
    lines = [json.dumps({**row, "seed": 1, "metric": metric, "score": score}) for metric, score in scores.items()]
    (tmp_path / "run" / "scores.jsonl").write_text("\n".join(lines) + "\n")
    text = written(tmp_path, checkpoint)
    assert "| most probable | 87.7 % |" in text and "| COMET | 0.8412 |" in text and "| chrF++ | 51.24 |" in text
    assert ".nan" not in text and "BLEU" not in text and "TER" not in text


def test_a_checkpoint_is_the_same_by_whatever_path_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained_alone(tmp_path / "run" / "train" / "mle" / "checkpoint-4")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"name": "run", "seeds": [1], "arms": ARMS}))
    row = {"arm": "mle", "checkpoint": "checkpoint-4", "test_set": "tiny", "pair": "en-de", "search": "greedy"}
    line = json.dumps({**row, "seed": 1, "metric": "bleu", "score": 31.25})
    (tmp_path / "run" / "scores.jsonl").write_text(line + "\n")
    (tmp_path / "latest").symlink_to(checkpoint)
    # Weights that were moved to another disk, with a link in their old place.
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(checkpoint)
    for number, path in enumerate((checkpoint, tmp_path / "latest", Path("."))):
        (tmp_path / str(number)).mkdir()
        text = written(tmp_path / str(number), path)
        assert "at step 4:" in text and "| 31.25 |" in text
    monkeypatch.chdir(tmp_path)
    checkpoint.rename(tmp_path / "disk" / "x")
    checkpoint.symlink_to(tmp_path / "disk" / "x")
    assert "| 31.25 |" in written(tmp_path, checkpoint)


def test_foreign_text_is_no_markup_in_a_card(tmp_path: Path) -> None:
    checkpoint = trained_alone(tmp_path / "run" / "train" / "mle" / "checkpoint-4")
    data = {"dataset": "x/`</code><b>y"}
    recipe = {"name": "run", "seeds": [1], "arms": ARMS, "data": data, "train": {"optim": "<i>a|b"}}
    recipe["arms"] = {"mle": {"objective": "mle"}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    row = {
        "arm": "mle",
        "seed": 1,
        "checkpoint": "checkpoint-4",
        "pair": "en-de",
        "search": "greedy",
        "metric": "bleu",
    }
    row |= {"test_set": "<script>alert(1)</script>", "score": 1.0, "signature": "a`<b>\u202e|c"}
    (tmp_path / "run" / "scores.jsonl").write_text(json.dumps(row) + "\n")
    _, head, body = written(tmp_path, checkpoint).split("---\n", 2)
    outside = re.sub("`[^`]*`", "", body)
    assert "<" not in outside and "`" not in outside and "\u202e" not in body
    assert "| &lt;script>alert(1)&lt;/script> |" in body and r"| &lt;i>a\|b |" in body
    assert yaml.safe_load(head)["model-index"][0]["results"][0]["dataset"]["type"] == "<script>alert(1)</script>"


def test_the_k_of_an_earlier_training_is_told_however_it_was_given(tmp_path: Path) -> None:
    arms = {
        "first": {"objective": "convex", "objective_kwargs": {"k": 3.0}},
        "then": {"objective": "power", "objective_kwargs": '{"k": 0.5}', "init_from": "first"},
    }
    text = card(tmp_path, "then", arms=arms)
    assert "- `first`, with the `convex` objective: k = 3.0" in text and "Settings: k = 0.5." in text
