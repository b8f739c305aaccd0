"""`convexlm train` on several processes of this machine: that they train together, and how they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convexlm.errors import Stopped, UserError
from convexlm.launch import training
from convexlm.launch.environment import Plan
from convexlm.launch.processes import Workers
from convexlm.training import complete_checkpoints
from training_helpers import TRAIN, Run, environment, relative, train, words, write_model_files, write_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_model_files(folder / "model")
    write_records(folder / "data.jsonl", 24, weights=True)
    return folder


def new_model(files):
    return {"config_name": files / "model", "tokenizer_name": files / "model", "dataset": files / "data.jsonl"}


def options(files, output_dir, *plain, **settings):
    common = {**new_model(files), "per_device_train_batch_size": 4}
    return ["train", *TRAIN, *words(*plain, output_dir=output_dir, **{**common, **settings})]


def command(argv):
    return [sys.executable, "-m", "convexlm.cli", *argv]


def start(argv, **variables):
    return subprocess.Popen(
        command(argv),
        env={**environment(), "PYTHONUNBUFFERED": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def call(argv, **variables):
    process = start(argv, **variables)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def children(pid):
    """Process ids of the children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_two_processes_train_as_one_and_the_result_is_told_once(files, tmp_path):
    code, out, err = call(options(files, tmp_path / "two", "--json", num_processes=2))
    assert code == 0, err
    assert json.loads(out)["steps"] == 20 and out.count("\n") == 1
    assert "2 processes on the CPU (gloo), DDP" in err and err.count("precision float32") == 1
    assert (tmp_path / "two/checkpoint-20/rng_state_1.pth").is_file()  # of a second process
    assert train(tmp_path / "one", **new_model(files), per_device_train_batch_size=8) == 0
    got, wanted = Run(tmp_path / "two"), Run(tmp_path / "one")
    assert relative(got.column("loss"), wanted.column("loss")) < 1e-5
    for name, value in wanted.weights.items():
        assert relative(got.weights[name], value) < 1e-5


def test_what_is_the_users_to_mend_is_told_in_one_line(files, tmp_path):
    code, out, err = call(options(files, tmp_path / "run", dataset="missing.jsonl", num_processes=2))
    assert code == 2 and out == ""
    assert err.count("missing.jsonl") == 1 and "convexlm train: error: missing.jsonl: no such file" in err
    assert "Traceback" not in err and "ChildFailedError" not in err


def test_a_signal_saves_and_stops_all_of_them(files, tmp_path):
    long = {"max_steps": 100_000, "save_steps": 100_000, "num_processes": 2}
    process = start(options(files, tmp_path / "run", **long))
    wait_for(lambda: lines_of(tmp_path / "run/metrics.jsonl") > 3, process)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode not in (0, 2) and out == "" and "Traceback" not in err, err
    assert all(map(is_gone, workers))
    last = complete_checkpoints(tmp_path / "run")[-1]
    step = int(last.name.split("-")[1])
    assert 3 < step < 100_000
    # One process goes on with what two have begun.
    more = {"max_steps": step + 2, "save_steps": 1, "per_device_train_batch_size": 8}
    assert train(tmp_path / "run", "--resume", **new_model(files), **more) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 3))


def torchrun(*argv):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m", "convexlm.cli"]
    done = subprocess.run(
        [sys.executable, *launcher, *argv], env=environment(), capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def test_under_torchrun_nothing_is_launched_again(files, tmp_path):
    before = set(children(os.getpid()))
    code, out, err = torchrun(*options(files, tmp_path / "run", "--json", num_processes=2, max_steps=2, save_steps=2))
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert (tmp_path / "run/checkpoint-2/rng_state_1.pth").is_file()
    assert set(children(os.getpid())) <= before  # other tests of this process may have left some


def test_under_a_launcher_another_number_or_file_is_refused(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(tmp_path / "run", **new_model(files), num_processes=4) == 2
    assert "--num_processes 4: a launcher has started 2 processes already" in capsys.readouterr().err
    assert train(tmp_path / "run", **new_model(files), accelerate_config="fsdp2") == 2
    assert "--accelerate_config: a launcher has started this process already" in capsys.readouterr().err


# -- processes, without what they train


def workers_of(script, *environments):
    return Workers([sys.executable, "-c", script], [{**os.environ, **values} for values in environments])


def test_workers_that_cannot_be_ended_by_sigterm_are_killed(monkeypatch):
    monkeypatch.setattr("convexlm.launch.processes.SECONDS_TO_FOLLOW", 0.2)
    monkeypatch.setattr("convexlm.launch.processes.SECONDS_TO_END", 0.5)
    script = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    script += "os.environ['FAIL'] == 'no' or sys.exit(3); time.sleep(300)"
    begun = time.monotonic()
    workers = workers_of(script, {"FAIL": "no"}, {"FAIL": "yes"})
    assert workers.wait() == [-signal.SIGKILL, 3] and workers.failed == 1
    assert time.monotonic() - begun < 60


IN_A_PROCESS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from convexlm.errors import Stopped, UserError
from convexlm.launch import training
from convexlm.launch.environment import Plan
from convexlm.launch.processes import Workers
workers = Workers([sys.executable, "-c", {child!r}], [{{**os.environ, "NUMBER": str(n)}} for n in range(2)])
print(workers.wait(), flush=True)
"""
NOTES_SIGNALS = """
import os, pathlib, signal, sys, time
from convexlm.launch.processes import die_with
die_with(os.getppid())
mine = pathlib.Path({folder!r}) / os.environ["NUMBER"]
seen = []
def note(number, frame):
    seen.append(number)
    mine.write_text(" ".join(map(str, seen)))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, note)
(mine.parent / (mine.name + ".pid")).write_text(str(os.getpid()))
while signal.SIGTERM not in seen:
    time.sleep(0.01)
sys.exit(9)
"""


@pytest.fixture
def launcher(tmp_path):
    child = NOTES_SIGNALS.format(folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_PROCESS.format(child=child)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal of its own, as far as signals go
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    files = [tmp_path / f"{number}.pid" for number in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in files), process)
    yield process, [int(path.read_text()) for path in files]
    process.kill()
    process.wait()


def test_every_signal_reaches_every_worker_once(launcher, tmp_path):
    """A Ctrl-C goes to all processes of a terminal's group; the workers are not in it."""
    process, _ = launcher
    in_order = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
    for sent in in_order:
        before = [(tmp_path / n).read_text() if (tmp_path / n).exists() else "" for n in "01"]
        os.killpg(process.pid, sent)
        wanted = [f"{seen} {int(sent)}".strip() for seen in before]
        if sent != signal.SIGTERM:
            wait_for(lambda wanted=wanted: [read(tmp_path / n) for n in "01"] == wanted, process)
    assert process.communicate(timeout=120)[0] == "[9, 9]\n"
    assert [read(tmp_path / n) for n in "01"] == [
        f"{int(signal.SIGUSR1)} {int(signal.SIGINT)} {int(signal.SIGTERM)}"
    ] * 2


def read(path):
    return path.read_text() if path.exists() else ""


def test_the_third_interrupt_kills(launcher):
    process, workers = launcher
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.communicate(timeout=60)[0] == "[-9, -9]\n"
    assert all(map(is_gone, workers))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux can tie a process to its parent")
def test_no_worker_outlives_a_launcher_that_was_killed(launcher):
    process, workers = launcher
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while not all(map(is_gone, workers)):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [(-9, 137, "process 3 of 4 ended by SIGKILL; the system ends"), (7, 7, "process 3 of 4 ended with exit code 7")],
)
def test_how_a_crash_is_told(tmp_path, capsys, code, exit_code, said):
    plan = Plan("MULTI_GPU", 4, 2, 2, False, True, {})
    with pytest.raises(SystemExit) as left:
        training._outcome(tmp_path, plan, [-15, code], 1, "train")
    assert left.value.code == exit_code and said in capsys.readouterr().err


def test_what_stopped_a_process_is_told_before_how_it_ended(tmp_path):
    plan = Plan("MULTI_GPU", 2, 2, 0, False, True, {})
    outcomes = [{"kind": "stopped", "message": "saved", "exit_code": 143}, {"kind": "user_error", "message": "mend"}]
    (tmp_path / "outcome.000000.json").write_text(json.dumps(outcomes[0]))
    with pytest.raises(Stopped, match="saved") as stopped:
        training._outcome(tmp_path, plan, [143, -15], 0, "train")
    assert stopped.value.exit_code == 143
    (tmp_path / "outcome.000001.json").write_text(json.dumps(outcomes[1]))
    with pytest.raises(UserError, match="mend"):
        training._outcome(tmp_path, plan, [143, 2], 0, "train")
