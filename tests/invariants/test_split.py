"""A training run is one trajectory, however its batches are split over micro-batches, processes and rows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from training_runs import (
    ARMS,
    BATCHES_OF_8,
    BOTH_WEIGHTINGS,
    ENGINES,
    EVALUATION,
    ON_TWO,
    WHOLE_DATA,
    WHOLE_ON_TWO,
    halfway,
    split,
)

from convexlm.checkpoints import INVENTORY_FILE
from convexlm.errors import UserError
from convexlm.launch.engine import refuse_another_engine
from convexlm.metrics_file import FILE_NAME, read_metrics
from training_helpers import STATISTICS, Run, relative, train

pytestmark = pytest.mark.invariant

STEPS = 20
TOLERANCE = 1e-5
EVERY_ARM = pytest.mark.parametrize("arm", ARMS)


def assert_same_run(got: Run, wanted: Run, tolerance=TOLERANCE):
    assert [line["step"] for line in got.train] == [line["step"] for line in wanted.train]
    for name in (*STATISTICS, "grad_norm", "num_tokens"):
        assert relative(got.column(name), wanted.column(name)) <= tolerance, name
    assert [line["step"] for line in got.eval] == [line["step"] for line in wanted.eval]
    for name in STATISTICS if wanted.eval else ():
        assert relative(got.column(name, "eval_"), wanted.column(name, "eval_")) <= tolerance, f"eval_{name}"
    assert got.weights.keys() == wanted.weights.keys()
    for name, value in wanted.weights.items():
        assert relative(got.weights[name], value) <= tolerance, name


@EVERY_ARM
def test_the_run_that_others_are_held_against_learns(runs, arm):
    """Or all that follows would compare runs that stand still."""
    run = runs.get(arm, "even", "8", BATCHES_OF_8["8"])
    assert len(run.train) == STEPS and run.train[-1]["step"] == STEPS
    loss = run.column("loss")
    first, sixth = loss[:3].mean(), loss[15:18].mean()  # three steps are an epoch
    assert sixth < first * (0.999 if arm in ("dft", "lora") else 0.99)
    assert (run.column("grad_norm") > 1e-2).all()
    assert loss.isfinite().all() and (loss > 0).all() and loss.unique().numel() == STEPS
    if arm not in ("mle", "power"):
        assert run.column("weight_mean").max() < 1 and run.column("effective_sample_size").max() < 1


@EVERY_ARM
@pytest.mark.parametrize("form", [name for name in BATCHES_OF_8 if name != "8"])
def test_micro_batches_and_rows(runs, arm, form):
    wanted = runs.get(arm, "even", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get(arm, "even", form, BATCHES_OF_8[form]), wanted)


@EVERY_ARM
@pytest.mark.parametrize("form", [name for name in WHOLE_DATA if name != "24"])
def test_packing(runs, arm, form):
    wanted = runs.get(arm, "even", "24", WHOLE_DATA["24"])
    assert_same_run(runs.get(arm, "even", form, WHOLE_DATA[form]), wanted)


@pytest.mark.slow
@EVERY_ARM
def test_two_processes(runs, arm):
    wanted = runs.get(arm, "even", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get_on_two(arm, "even", "2x2x2"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["convex", "convex_by_sequence"])
def test_two_processes_without_padding(runs, arm):
    wanted = runs.get(arm, "even", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get_on_two(arm, "even", "2x4_padding_free"), wanted)
    wanted = runs.get(arm, "even", "24", WHOLE_DATA["24"])
    for name in WHOLE_ON_TWO:
        assert_same_run(runs.get_on_two(arm, "even", name), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("arm", BOTH_WEIGHTINGS)
def test_two_processes_padded_and_packed(runs, arm, engine):
    wanted = runs.get(arm, "even", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get_on_two(arm, "even", "2x2x2", engine), wanted)
    wanted = runs.get(arm, "even", "24", WHOLE_DATA["24"])
    got = runs.get_on_two(arm, "even", "2x1x32_bfd", engine)
    assert_same_run(got, wanted)
    assert (got.checkpoint / "pytorch_model_fsdp.bin").exists() == (engine == "fsdp2")


@pytest.mark.slow
def test_lora_under_fsdp2(runs):
    wanted = runs.get("lora", "even", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get_on_two("lora", "even", "2x2x2", "fsdp2"), wanted)


@pytest.mark.slow
def test_a_trained_copy_of_a_tied_embedding_and_sgd_resumed_under_fsdp2(runs):
    """accelerate ties embeddings anew, and torch loads no optimizer without a state."""
    wanted = runs.get("lora", "even", "copy", runs.with_a_copy(BATCHES_OF_8["8"]))
    assert any("embed_tokens" in name for name in wanted.weights)
    assert_same_run(runs.get_on_two("lora", "even", "copy", "fsdp2"), wanted)


@pytest.mark.slow
def test_the_best_is_loaded_after_an_evaluation_under_fsdp2(runs):
    runs.make_on_two("fsdp2")
    folder = runs.folder / "two-fsdp2-convex-even-best"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_counted_in_bfloat16_is_exact(runs, engine):
    wanted = runs.get("convex", "even", "bf16-8", {**BATCHES_OF_8["8"], **runs.in_bfloat16(10)})
    got = runs.get_on_two("convex", "even", "bf16", engine)
    for prefix, names in (("", ("num_target_tokens", "num_tokens")), ("eval_", ("num_target_tokens",))):
        for name in names:
            assert torch.equal(got.column(name, prefix), wanted.column(name, prefix)), prefix + name
    assert wanted.eval[0]["eval_num_target_tokens"] > 2 * 256, "bfloat16 counts no further by ones"
    for name in STATISTICS:
        near = 0.1 if name == "token_accuracy" else 0.02  # the best of near equals changes with the rounding
        assert relative(got.column(name), wanted.column(name)) < near, name
        assert relative(got.column(name, "eval_"), wanted.column(name, "eval_")) < near, f"eval_{name}"


# Adam divides by the root of gradients that are near zero at first, which makes much of a rounding.
TOLERANCE_OF_ADAM = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_saved_and_resumed_on_two_processes(runs, engine):
    wanted = runs.get("convex", "even", "whole", halfway(4))
    assert_same_run(runs.get_on_two("convex", "even", "first-half", engine), wanted, TOLERANCE_OF_ADAM)


@pytest.mark.slow
def test_saved_on_one_process_and_resumed_on_two(runs):
    runs.make_on_two("ddp")
    wanted = runs.get("convex", "even", "whole", halfway(4))
    assert_same_run(Run(runs.folder / "convex-even-to-resume-on-two"), wanted, TOLERANCE_OF_ADAM)


@pytest.mark.slow
def test_saved_on_two_processes_and_resumed_on_one(runs, tmp_path):
    runs.make_on_two("ddp")
    shutil.copytree(runs.folder / "two-ddp-convex-even-to-resume-on-one", tmp_path / "run")
    assert train(tmp_path / "run", "--resume", **runs.options("convex", "even", halfway(4))) == 0
    wanted = runs.get("convex", "even", "whole", halfway(4))
    assert_same_run(Run(tmp_path / "run"), wanted, TOLERANCE_OF_ADAM)


@pytest.mark.slow
def test_saved_under_fsdp2_and_resumed_on_one(runs, tmp_path):
    runs.make_on_two("fsdp2")
    shutil.copytree(runs.folder / "two-fsdp2-convex-even-first-half", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-20")
    assert (tmp_path / "run" / "checkpoint-10" / "pytorch_model_fsdp.bin").exists()
    assert train(tmp_path / "run", "--resume", **runs.options("convex", "even", halfway(4))) == 0
    wanted = runs.get("convex", "even", "whole", halfway(4))
    assert_same_run(Run(tmp_path / "run"), wanted, TOLERANCE_OF_ADAM)


@pytest.mark.slow
def test_saved_under_fsdp2_and_resumed_under_ddp(runs):
    runs.make_on_two("fsdp2")
    folder = runs.folder / "fsdp2-to-resume-under-ddp"
    shutil.copytree(runs.folder / "two-fsdp2-convex-even-first-half", folder)
    shutil.rmtree(folder / "checkpoint-20")
    runs.plan_on_two("convex", "even", "resumed", halfway(2), "ddp", folder, ["--resume"])
    runs.make_on_two("ddp")
    assert_same_run(Run(folder), runs.get("convex", "even", "whole", halfway(4)), TOLERANCE_OF_ADAM)


@pytest.mark.slow
def test_what_only_fsdp_goes_on_from_and_what_it_cannot(runs, tmp_path, capsys, monkeypatch):
    runs.make_on_two("fsdp2")
    shutil.copytree(runs.folder / "two-fsdp2-convex-even-first-half", tmp_path / "run")
    saved = tmp_path / "run" / "checkpoint-20"
    with pytest.raises(UserError, match="was saved under FSDP, which only FSDP"):
        refuse_another_engine(tmp_path / "run", resume=True, zero_stage=3, processes=2)
    (saved / "optimizer.bin").rename(saved / "optimizer_0.bin")  # as if every process had saved its part
    (saved / INVENTORY_FILE).unlink()
    options = runs.options("convex", "even", {**halfway(4), "max_steps": 30})
    assert train(tmp_path / "run", "--resume", **options) == 2
    assert "was saved under FSDP as shards" in capsys.readouterr().err
    one = runs.get("convex", "even", "whole", halfway(4)).folder
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="was saved without FSDP"):
        refuse_another_engine(one, resume=True)


UNEVEN = {
    "8": split(8, per_device_eval_batch_size=8),
    "4x2": split(4, 2, per_device_eval_batch_size=3),
    "1x8": split(1, 8, per_device_eval_batch_size=1),
    "left": split(2, 4, per_device_eval_batch_size=4, padding_side="left"),
    "padding_free": split(4, 2, per_device_eval_batch_size=4, padding_free=True),
    "eval_packing": split(4, 2, per_device_eval_batch_size=4, padding_free=True, eval_packing=True),
}


@pytest.mark.parametrize("arm", ["convex", "convex_by_sequence", "dft"])
@pytest.mark.parametrize("form", [name for name in UNEVEN if name != "8"])
def test_a_last_batch_that_is_not_full(runs, arm, form):
    """21 records in batches of 8, and 7 to evaluate on."""
    wanted = runs.get(arm, "uneven", "8", {**UNEVEN["8"], **EVALUATION})
    assert [line["step"] for line in wanted.eval] == [6, 12, 18, 20]
    assert_same_run(runs.get(arm, "uneven", form, {**UNEVEN[form], **EVALUATION}), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["convex", "convex_by_sequence"])
@pytest.mark.parametrize("form", ON_TWO)
def test_a_last_batch_that_is_filled_up_on_two_processes(runs, arm, form):
    """Records that fill up the last batch of the processes count nowhere, in training and in evaluation."""
    wanted = runs.get(arm, "uneven", "8", {**UNEVEN["8"], **EVALUATION})
    assert_same_run(runs.get_on_two(arm, "uneven", form), wanted)


def test_evaluation_does_not_change_training(runs):
    wanted = runs.get("convex", "uneven", "8", {**UNEVEN["8"], **EVALUATION})
    without = runs.get("convex", "uneven", "8-without-evaluation", split(8))
    assert without.eval == []
    for name in (*STATISTICS, "grad_norm", "num_tokens"):
        assert torch.equal(without.column(name), wanted.column(name)), name
    for name, value in wanted.weights.items():
        assert torch.equal(without.weights[name], value)


def test_logging_less_often_sums_over_the_steps_between(runs):
    fine = runs.get("convex", "even", "8", BATCHES_OF_8["8"])
    coarse = runs.get("convex", "even", "logged-each-4", {**split(2, 4), "logging_steps": 4})
    assert [line["step"] for line in coarse.train] == [4, 8, 12, 16, 20]
    counts = fine.column("num_target_tokens").view(5, 4)
    assert torch.equal(coarse.column("num_target_tokens"), counts.sum(1))
    assert torch.equal(coarse.column("num_tokens"), fine.column("num_tokens").view(5, 4)[:, -1])
    lowest = fine.column("weight_min").view(5, 4).amin(1)
    assert relative(coarse.column("weight_min"), lowest) <= TOLERANCE
    assert relative(coarse.column("loss"), fine.column("loss").view(5, 4).mean(1)) <= TOLERANCE
    for name in ("nll", "token_accuracy", "entropy", "weight_mean"):
        steps = fine.column(name).view(5, 4)
        got = coarse.column(name)
        assert (got >= steps.amin(1) - 1e-6).all() and (got <= steps.amax(1) + 1e-6).all(), name


@pytest.mark.parametrize("arm", ["convex", "lora"])
def test_resuming_goes_on_as_if_nothing_had_happened(runs, arm, tmp_path):
    settings = {
        **split(2, 4, k_warmup=0.6, save_steps=7, optim="adamw_torch", learning_rate=0.01),
        **{"lr_scheduler_type": "linear", **EVALUATION, "per_device_eval_batch_size": 3},
    }
    options = runs.options(arm, "uneven", settings)
    assert train(tmp_path / "whole", **options) == 0
    whole = Run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (14, 20):  # as if stopped after step 12 or so, while writing a line
        shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{step}")
    with (tmp_path / "stopped" / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write('{"step": 21, "lo')
    assert train(tmp_path / "stopped", "--resume", **options) == 0
    resumed = Run(tmp_path / "stopped")
    assert [line["step"] for line in resumed.train] == list(range(1, STEPS + 1))
    assert_same_run(resumed, whole, tolerance=1e-7)
    timing = ("runtime", "samples_per_second", "steps_per_second")
    strip = lambda line: {k: v for k, v in line.items() if not k.endswith(timing)}  # noqa: E731
    assert [strip(line) for line in read_metrics(tmp_path / "stopped")] == [
        pytest.approx(strip(line), rel=1e-7) for line in read_metrics(tmp_path / "whole")
    ]


def test_every_line_is_json_with_counts_as_integers(runs):
    run = runs.get("convex", "uneven", "8", {**UNEVEN["8"], **EVALUATION})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (run.folder / FILE_NAME).read_text(encoding="utf-8").splitlines():
        values = json.loads(line, parse_constant=refuse)
        prefix = "eval_" if "eval_loss" in values else ""
        assert type(values[f"{prefix}num_target_tokens"]) is int
        assert prefix or type(values["num_tokens"]) is int
