"""One training on the processes of a launch: the launcher's side.

The options go to the processes in a file, not on their command lines, which every user of the machine could read. Each
process leaves its outcome as a file beside it (`child`), so that a user's mistake is told once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import Stopped, UserError
from convexlm.launch.environment import make_plan
from convexlm.launch.processes import Workers
from convexlm.progress import note

if TYPE_CHECKING:
    from convexlm.launch.environment import Plan
    from convexlm.launch.settings import LaunchSettings

JOB_FILE, JOB_VARIABLE = "job.json", "CONVEXLM_LAUNCH_JOB"
PARENT_VARIABLE = "CONVEXLM_LAUNCH_PARENT"
TRACEBACK_FILES = "traceback.*.txt"
LOCAL_ADDRESS = "127.0.0.1"


def launch_training(
    settings: LaunchSettings,
    options: dict[str, Any],
    *,
    resume: bool = False,
    title: str = "train",
    meeting: tuple[Any, int] | None = None,
) -> dict[str, Any]:
    """Train on the processes that the settings say.

    Args:
        settings: resolved.
        options: of `convexlm train`.
        resume: as `train_model` takes it.
        title: what the progress calls this run.
        meeting: the store at which the processes find each other, or None if another machine keeps it, and its port;
            opened here, at `main_process_port` or (on one machine) any free one, if not given.

    Returns:
        What `train_model` returned on this machine's first process.

    Raises:
        UserError: the launch does not fit this machine, or what a process has found to be the user's mistake.
        Stopped: the training was stopped before its end, or the disk is full or not to be written.
        KeyboardInterrupt: aborted by Ctrl-C.
        SystemExit: a process failed; it has told why on stderr.
    """
    plan = make_plan(settings, use_cpu=bool(options.get("use_cpu")))
    if plan.on_cpu:
        # Under DeepSpeed the processes see no GPU, and must not be told (see `environment`).
        options = {**options, "use_cpu": plan.kind != "DEEPSPEED"}
    note(f"  {title}: {describe(settings, plan)}")
    address = settings.main_process_ip if settings.machines > 1 else LOCAL_ADDRESS
    store, port = meeting or _meeting(settings, plan)
    with tempfile.TemporaryDirectory(prefix="convexlm-launch-") as folder:
        job = Path(folder) / JOB_FILE
        job.write_text(json.dumps({"options": options, "resume": resume, "title": title}), encoding="utf-8")
        own = {JOB_VARIABLE: str(job), PARENT_VARIABLE: str(os.getpid())}
        environments = [{**plan.of_process(n, str(address), port), **own} for n in range(plan.local)]
        workers = Workers([sys.executable, "-m", "convexlm.launch.child"], environments)
        codes = workers.wait()
        del store
        return _outcome(Path(folder), plan, codes, workers.failed, title)


def _meeting(settings: LaunchSettings, plan: Plan) -> tuple[Any, int]:
    port = int(settings.main_process_port or 0)
    return (None, port) if plan.alone or settings.machine_rank else open_store(port)


def open_store(port: int) -> tuple[Any, int]:
    """The store at which processes find each other, and its port; 0 asks for any free one.

    Raises:
        UserError: the port is taken.
    """
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        store = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=30))
    except RuntimeError as error:
        raise UserError(
            f"--main_process_port {port}: cannot be used ({str(error).strip().splitlines()[0]}); give another"
        ) from None
    return store, store.port


def describe(settings: LaunchSettings, plan: Plan) -> str:
    """A launch in words: how many processes, where, and how they share the work."""
    how = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "NO": "one process"}.get(plan.kind, "DDP")
    if settings.accelerate_config:
        how += f" ({settings.accelerate_config})"
    where = "the CPU (gloo)" if plan.on_cpu else "GPUs" if plan.world > 1 else "one device"
    machines = f" of {settings.machines} machines (this is {settings.machine_rank})" if settings.machines > 1 else ""
    return f"{plan.world} process{'es' * (plan.world > 1)} on {where}{machines}, {how}"


def _outcome(folder: Path, plan: Plan, codes: list[int], first: int | None, title: str) -> dict[str, Any]:
    told = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("outcome.*.json"))]
    for kind in ("user_error", "failed", "stopped", "interrupted"):
        for outcome in told:
            if outcome["kind"] == kind:
                _raise(outcome)
    if first is None:
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    number, code = first, codes[first]
    # Where one fails, the others mostly fail of losing it, a moment later.
    tracebacks = sorted(folder.glob(TRACEBACK_FILES), key=lambda path: path.stat().st_mtime_ns)
    if tracebacks and code > 0:
        sys.stderr.write(tracebacks[0].read_text(encoding="utf-8"))
    by = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    hint = "; the system ends processes so when memory runs out" if code == -signal.SIGKILL else ""
    note(f"  {title}: process {plan.first_rank + number} of {plan.world} ended {by}{hint}")
    raise SystemExit(128 - code if code < 0 else code)


def _raise(outcome: dict[str, Any]) -> None:
    if outcome["kind"] == "user_error":
        raise UserError(outcome["message"])
    if outcome["kind"] in ("stopped", "failed"):
        raise Stopped(outcome["message"], outcome.get("exit_code", 1))
    raise KeyboardInterrupt
