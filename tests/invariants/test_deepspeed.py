"""DeepSpeed's ZeRO on two CPU processes (gloo): the trajectory of one process."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_split import TOLERANCE_OF_ADAM, assert_same_run
from training_runs import BATCHES_OF_8, BOTH_WEIGHTINGS, ON_TWO, WHOLE_DATA, WHOLE_ON_TWO, ZERO, Runs, halfway, split
from transformers import AutoModelForCausalLM

from convexlm.errors import UserError
from convexlm.export import export_checkpoint
from convexlm.launch.deepspeed import refuse_code, zero_folder
from convexlm.launch.engine import refuse_another_engine
from training_helpers import environment, relative, tiny_config, tiny_tokenizer

pytestmark = [
    pytest.mark.invariant,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
    ),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("deepspeed"))
    tiny_tokenizer().save_pretrained(made.folder / "tied")
    tiny_config(tie_word_embeddings=True).save_pretrained(made.folder / "tied")
    for engine in ZERO:
        for arm in BOTH_WEIGHTINGS:
            made.plan_on_two(arm, "even", "2x2x2", ON_TWO["2x2x2"], engine)
            made.plan_on_two(arm, "even", "2x1x32_bfd", WHOLE_ON_TWO["2x1x32_bfd"], engine)
        made.plan_on_two("convex", "even", "tied", tied(made, 2), engine)
        made.plan_on_two("convex", "even", "first-half", halfway(2, stop=10), engine)
        half = made.folder / f"two-{engine}-convex-even-first-half"
        made.plan_on_two("convex", "even", "", halfway(2), engine, folder=half, resume=["--resume"])
    made.plan_on_two("convex", "uneven", "2x2x2", ON_TWO["2x2x2"], "zero2")
    made.plan_on_two("lora", "even", "2x2x2", ON_TWO["2x2x2"], "zero3")
    return made


def tied(runs, batch):
    return split(batch, 2 if batch == 2 else 1, config_name=runs.folder / "tied")


@pytest.mark.parametrize("engine", ZERO)
@pytest.mark.parametrize("arm", BOTH_WEIGHTINGS)
def test_padded_and_packed(runs, arm, engine):
    wanted = runs.get(arm, "even", "8", BATCHES_OF_8["8"])
    got = runs.get_on_two(arm, "even", "2x2x2", engine)
    assert_same_run(got, wanted)
    assert zero_folder(got.checkpoint) is not None
    assert_same_run(runs.get_on_two(arm, "even", "2x1x32_bfd", engine), runs.get(arm, "even", "24", WHOLE_DATA["24"]))


@pytest.mark.parametrize("engine", ZERO)
def test_tied_weights(runs, engine):
    assert_same_run(runs.get_on_two("convex", "even", "tied", engine), runs.get("convex", "even", "t", tied(runs, 8)))


def test_a_last_batch_that_is_filled_up_and_lora(runs):
    wanted = runs.get("convex", "uneven", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get_on_two("convex", "uneven", "2x2x2", "zero2"), wanted)
    wanted = runs.get("lora", "even", "8", BATCHES_OF_8["8"])
    assert_same_run(runs.get_on_two("lora", "even", "2x2x2", "zero3"), wanted)


@pytest.mark.parametrize("engine", ZERO)
def test_saved_and_resumed(runs, engine):
    wanted = runs.get("convex", "even", "whole", halfway(4))
    assert_same_run(runs.get_on_two("convex", "even", "first-half", engine), wanted, TOLERANCE_OF_ADAM)


@pytest.mark.parametrize("engine", ZERO)
def test_weights_load_anywhere(runs, engine, tmp_path):
    got = runs.get_on_two("convex", "even", "tied", engine)
    model = AutoModelForCausalLM.from_pretrained(got.checkpoint)
    wanted = runs.get("convex", "even", "t", tied(runs, 8)).weights["model.embed_tokens.weight"]
    assert relative(model.lm_head.weight.detach(), wanted) < 1e-5
    shards = tmp_path / "shards"
    shutil.copytree(got.checkpoint, shards)
    for path in shards.glob("*.safetensors"):
        path.unlink()
    (shards / "convexlm.json").unlink()
    assert export_checkpoint(shards, tmp_path / "out")["kind"] == "zero"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(exported.lm_head.weight.detach(), wanted) < 1e-5


@pytest.mark.parametrize("engine", ZERO)
def test_only_the_same_goes_on_from_it(runs, engine):
    run = runs.get_on_two("convex", "even", "first-half", engine)
    stage = int(engine[-1])
    for given in ({}, {"zero_stage": 5 - stage, "processes": 2}, {"zero_stage": stage, "processes": 4}):
        with pytest.raises(UserError, match=f"give --accelerate_config {engine} --num_processes 2"):
            refuse_another_engine(run.folder, resume=True, **given)
    refuse_another_engine(run.folder, resume=True, zero_stage=stage, processes=2)
    one = runs.get("convex", "even", "whole", halfway(4)).folder
    with pytest.raises(UserError, match="saved without DeepSpeed"):
        refuse_another_engine(one, resume=True, zero_stage=stage, processes=2)


def test_the_fused_head_gathers_its_weight_once():
    """Once in the forward and once in the backward pass; tied, once more each, as the embedding."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    made = {**environment(), **alone, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    script = str(Path(__file__).with_name("zero3_head.py"))
    done = subprocess.run([sys.executable, script], env=made, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    for found, times in zip(json.loads(line.removeprefix("found ")), (1, 2), strict=True):
        assert found["numbers_before"] == 0  # it was sharded
        assert found["gathers"] == {"forward": times, "backward": times}
        assert found["loss"] < 1e-6 and found["gradient"] < 1e-7 < 1e-3 < found["largest"]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("engine", ZERO)
def test_code_in_its_pickles_is_not_run(runs, engine, tmp_path):
    run = runs.get_on_two("convex", "even", "first-half", engine)
    folder = tmp_path / "checkpoint-20"
    shutil.copytree(run.checkpoint, folder)
    states = zero_folder(folder)
    refuse_code(states)
    victim = next(states.glob("*_optim_states.pt"))
    torch.save({"state": Code(tmp_path / "run")}, victim)
    with pytest.raises(UserError, match=r"names .*open, which does not belong there"):
        refuse_code(states)
    victim.write_bytes(pickle.dumps(Code(tmp_path / "run")))
    with pytest.raises(UserError, match="not a file of DeepSpeed's states"):
        refuse_code(states)
    assert not (tmp_path / "run").exists()
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match="names no folder"):
        zero_folder(folder)
