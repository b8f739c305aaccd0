"""`convexlm run` whose trainings are on several processes, and on two machines (here two of one machine)."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed import TCPStore

from convexlm import cli
from convexlm.errors import Stopped, UserError
from convexlm.launch.settings import LaunchSettings
from convexlm.pipeline import train_options
from convexlm.recipe import load_recipe
from convexlm.runs import RunFolder, trained_runs
from pipeline_helpers import recipe_with, start, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SHORT = {
    "seeds": [1],
    "train__global_batch_size": 16,
    "train__max_steps": 2,
    "train__save_steps": 2,
    "arms": {
        "base": {"objective": "mle", "decode": False},
        "mle": {"objective": "mle", "init_from": "base"},
    },
    "test_sets": [{"name": "toy", "kind": "tinyworld", "pairs": ["en-de"], "size": 3, "seed": 5}],
    "decode": {"checkpoints": "last", "batch_size": 2, "searches": [{"num_beams": 1, "max_new_tokens": 6}]},
}


def on_machines(home: Path) -> list[tuple[int, str, str]]:
    """The same command on machine 1 and 0; exit code, stdout and stderr of machine 0, then of machine 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["run", "tiny.yaml", "--run_dir", "run", "--json", "--num_machines", "2", "--num_processes", "2"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--machine_rank"]
    other, first = start([*words, "1"], home), start([*words, "0"], home)
    out, err = first.communicate(timeout=400)
    told, log = other.communicate(timeout=120)
    return [(first.returncode, out, err), (other.returncode, told, log)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    home = tmp_path_factory.mktemp("machines")
    write_recipe(home, recipe_with(**SHORT))
    return home, on_machines(home)


def test_two_machines_make_one_run(finished: tuple[Path, Any]) -> None:
    home, ((code, out, err), (other_code, other_out, other_err)) = finished
    assert code == 0, err
    assert other_code == 0, other_err
    assert json.loads(out)["report"] == "run/report.html"
    assert json.loads(other_out)["trained"] == ["base", "mle"]
    for name in ("base", "mle"):
        assert (home / f"run/train/{name}/checkpoint-2/rng_state_1.pth").is_file()
    assert "[3/5] decode" in err and "decode" not in other_err and "timed out" not in other_err


def test_a_run_is_taken_up_at_a_later_training(finished: tuple[Path, Any], tmp_path: Path) -> None:
    """Machine 1 need not know what is done: it would wait forever in a training that machine 0 leaves out."""
    shutil.copytree(finished[0], tmp_path / "home")
    run = tmp_path / "home" / "run"
    before = (run / "scores.jsonl").read_bytes()
    (run / "train/mle/done.json").unlink()
    shutil.rmtree(run / "train/mle/checkpoint-2")
    (code, _, err), (other_code, other_out, other_err) = on_machines(tmp_path / "home")
    assert code == 0, err
    assert other_code == 0, other_err
    assert json.loads(other_out)["trained"] == ["mle"]
    assert err.count(": done") >= 1 and (run / "scores.jsonl").read_bytes() == before


def test_what_was_trained_on_two_is_done_for_one(
    finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the command line's launch nor the recipe's is part of what was trained."""
    home = finished[0]
    monkeypatch.chdir(home)
    write_recipe(home, recipe_with(**SHORT, launch={"num_processes": 2, "accelerate_config": "fsdp2"}), "other.yaml")
    assert cli.main(["run", "other.yaml", "--run_dir", "run", "--json"]) == 0
    assert capsys.readouterr().err.count(": done") >= 2


def test_a_machine_that_loses_the_first_stops(tmp_path: Path) -> None:
    from convexlm.launch.machines import _get
    from convexlm.launch.training import open_store

    store, port = open_store(0)
    client = TCPStore("127.0.0.1", port, is_master=False)
    store.set("there", "value")
    assert _get(client, "there", "here") == "value"
    threading.Timer(1.0, lambda: lost.clear()).start()
    lost = [store]
    del store
    with pytest.raises(Stopped, match="lost machine 0 at here"):
        _get(client, "never", "here")


def test_another_recipe_on_the_other_machine_is_refused(tmp_path: Path) -> None:
    from convexlm.launch.machines import lead, take_part

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = {"num_machines": 2, "num_processes": 2, "main_process_ip": "127.0.0.1", "main_process_port": port}
    with (
        lead(LaunchSettings(**both, machine_rank=0), "one"),
        pytest.raises(UserError, match="runs another recipe"),
    ):
        take_part(LaunchSettings(**both, machine_rank=1), "another")


# -- the global batch


def plan_of(home: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    path = home / "tiny.yaml"
    assert cli.main(["run", str(path), "--run_dir", str(home / "run"), "--dry_run", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_shows_the_launchs_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(tmp_path, recipe_with(**SHORT))
    for words, batch in (
        ([], "8 x 2 accumulated x 1 processes"),
        (["--num_processes", "2"], "8 x 1 accumulated x 2 processes"),
        (["--num_machines", "2", "--num_processes", "2"], "8 x 1 accumulated x 2 processes"),
    ):
        train = plan_of(tmp_path, capsys, *words)["train"][0]
        assert train["batch"] == batch and train["global_batch"] == 16
    write_recipe(tmp_path, recipe_with(**SHORT, launch={"num_processes": 2, "accelerate_config": "fsdp2"}))
    assert plan_of(tmp_path, capsys)["train"][0]["batch"] == "8 x 1 accumulated x 2 processes"
    # The command line wins.
    assert plan_of(tmp_path, capsys, "--num_processes", "1")["train"][0]["batch"] == "8 x 2 accumulated x 1 processes"


def test_a_global_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, recipe_with(**SHORT, launch={"num_processes": 3})))
    with pytest.raises(UserError, match="global_batch_size 16 is no multiple of per_device_train_batch_size x"):
        train_options(recipe, RunFolder(tmp_path / "run"), trained_runs(recipe)[0])


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ({"num_process": 2}, "key in `launch`: `num_process`; did you mean `num_processes`?"),
        ({"machine_rank": 1}, "key in `launch`: `machine_rank`"),
        ({"accelerate_config": "zero9"}, "`launch`: --accelerate_config zero9"),
        ({"num_processes": 0}, "`launch`: --num_processes must be"),
        ({"accelerate_config": ["fsdp2"]}, "`launch.accelerate_config` must be a text"),
        (["fsdp2"], "`launch` must be a mapping"),
    ],
    ids=str,
)
def test_a_launch_that_cannot_be_meant_is_told_with_its_key(tmp_path: Path, launch: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write_recipe(tmp_path, recipe_with(launch=launch)))
    assert said in str(error.value)
