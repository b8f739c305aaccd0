"""`resume_from_checkpoint` in a script of one's own: what was not written to the end is never gone on with."""

from __future__ import annotations

import shutil

import pytest

from convexlm.checkpoints import COMPLETE_FILE, SAVING_FILE
from trainer_helpers import assert_same_weights, make, trained
from training_helpers import rows

SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}


@pytest.fixture
def whole(tmp_path):
    return trained(tmp_path / "run", rows(10), **SAVED)


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path, whole, caplog):
    """Without its optimizer transformers' Trainer would go on from there, with moments that begin anew."""
    folder = tmp_path / "run"
    for step in (4, 6):
        torn = folder / f"checkpoint-{step}"
        (torn / "optimizer.pt").unlink()
        (torn / SAVING_FILE).touch()
    again = make(folder, rows(10), **SAVED)
    with pytest.raises(ValueError, match="checkpoint-4 was not written to the end"):
        again.train(str(folder / "checkpoint-4"))
    again.train(resume_from_checkpoint=True)
    assert again._initial_global_step == 2
    assert caplog.text.count("is passed over: it was not written to the end") == 2
    assert_same_weights(again, whole, rtol=0, atol=0)


def test_a_checkpoint_killed_between_its_marker_and_the_end_of_saving_is_gone_on_from(tmp_path, whole):
    """Its marker is written last of all, so everything is there; `convexlm train --resume` chooses it by that."""
    folder = tmp_path / "run"
    for name in (COMPLETE_FILE, SAVING_FILE):
        (folder / "checkpoint-4" / name).touch()
    for given in (True, str(folder / "checkpoint-4")):
        again = make(folder, rows(10), **SAVED)
        shutil.rmtree(folder / "checkpoint-6", ignore_errors=True)
        again.train(resume_from_checkpoint=given)
        assert again._initial_global_step == 4
        assert_same_weights(again, whole, rtol=0, atol=0)


def test_where_nothing_is_left_to_resume_from_that_is_said(tmp_path, whole):
    folder = tmp_path / "run"
    for step in (2, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / "checkpoint-6" / "optimizer.pt").unlink()  # as `save_only_model` leaves it
    again = make(folder, rows(10), **SAVED)
    for given in (True, str(folder / "checkpoint-6")):
        with pytest.raises(ValueError, match=r"checkpoint-6 has no optimizer \(`save_only_model`\)"):
            again.train(resume_from_checkpoint=given)
    shutil.rmtree(folder / "checkpoint-6")
    with pytest.raises(ValueError, match="no checkpoint to resume from that was written to the end"):
        again.train(resume_from_checkpoint=True)
