"""`convexlm run` on several machines that share a run folder: machine 0 leads, the others take part in its trainings.

Machine 0 does the data, says which training comes next, and decodes and scores alone. The others do not look into the
folder to find out what is done, which would be a race: they train what they are told, until they are told the end. So
it makes no difference at which training a run is taken up again. They talk over a store of torch's on machine 0, at
`main_process_port`; each training has a store of its own.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import Stopped, UserError
from convexlm.launch.training import launch_training, open_store
from convexlm.progress import note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convexlm.launch.settings import LaunchSettings

SECONDS_BETWEEN_TRIES = 2.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_BE_SEEN = 60.0  # for a file that machine 0 has written, on a shared file system
SECONDS_TO_PART = 30.0
SECONDS_TO_CONNECT = 30.0


@dataclass
class Lead:
    """Machine 0 of several."""

    settings: LaunchSettings
    store: Any
    number: int = 0

    def train(self, options: dict[str, Any], title: str) -> dict[str, Any]:
        """One training on all machines; as `launch_training`."""
        meeting = open_store(0)
        self.tell({"options": options, "title": title, "port": meeting[1]})
        return launch_training(self.settings, options, resume=True, title=title, meeting=meeting)

    def tell(self, what: dict[str, Any]) -> None:
        """Say what comes next."""
        self.store.set(f"next/{self.number}", json.dumps(what))
        self.number += 1


@contextlib.contextmanager
def lead(settings: LaunchSettings, identity: str) -> Iterator[Lead]:
    """Be machine 0 while the trainings are done; the others are told the end, also if it is an error.

    Args:
        settings: resolved, with more than one machine.
        identity: what has to be the same on all machines: the recipe's hash.

    Raises:
        UserError: the port is taken.
    """
    store, port = open_store(int(settings.main_process_port or 0))
    note(f"      machine 0 of {settings.machines}; the others find it at {settings.main_process_ip}:{port}")
    store.set("identity", identity)
    leading = Lead(settings, store)
    end = {"end": "failed"}
    try:
        yield leading
        end = {"end": "done"}
    finally:
        leading.tell(end)
        _wait_for_parting(store, settings.machines - 1)


def take_part(settings: LaunchSettings, identity: str) -> list[str]:
    """Be one of the other machines: train what machine 0 says.

    Returns:
        The names of the trainings that this machine took part in.

    Raises:
        UserError: machine 0 runs another recipe, or its run folder is not seen here.
        Stopped: machine 0 has failed or is gone.
    """
    where = f"{settings.main_process_ip}:{settings.main_process_port}"
    store = _connect(settings, where)
    trained: list[str] = []
    try:
        if _get(store, "identity", where) != identity:
            raise UserError(f"machine 0 at {where} runs another recipe, or other settings of it")
        while True:
            told = json.loads(_get(store, f"next/{len(trained)}", where))
            if "end" in told:
                break
            _see_files(told["options"], int(settings.machine_rank or 0))
            # Machine 0 keeps the training's store; this machine only has to know where it is.
            launch_training(
                settings, told["options"], resume=True, title=told["title"], meeting=(None, int(told["port"]))
            )
            trained.append(told["title"])
    finally:
        with contextlib.suppress(RuntimeError):
            store.add("parted", 1)
    if told["end"] != "done":
        raise Stopped(f"machine 0 at {where} has stopped before the last training; its own log says why")
    return trained


def _connect(settings: LaunchSettings, where: str) -> Any:
    from torch.distributed import TCPStore

    address, port = str(settings.main_process_ip), int(settings.main_process_port or 0)
    told = False
    while True:
        try:  # torch would print a page for every try, and not hear a Ctrl-C
            socket.create_connection((address, port), timeout=SECONDS_BETWEEN_TRIES).close()
            return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SECONDS_TO_CONNECT))
        except socket.gaierror as error:
            raise UserError(f"--main_process_ip {address}: {error.strerror}") from None
        except (OSError, RuntimeError):
            if not told:
                note(f"  waiting for machine 0 at {where}")
            told = True
            time.sleep(SECONDS_BETWEEN_TRIES)


def _get(store: Any, key: str, where: str) -> str:
    """Wait for a key as long as machine 0 is there."""
    try:
        while not store.check([key]):  # waiting in the store, torch would print a line for every time-out
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return str(store.get(key).decode())
    except RuntimeError:
        raise Stopped(f"lost machine 0 at {where}; the same command takes part again") from None


def _see_files(options: dict[str, Any], machine: int) -> None:
    """Wait a while for what machine 0 has written; a shared file system may be late."""
    named = [options.get(key) for key in ("dataset", "eval_dataset", "config_name", "model_name_or_path")]
    run_folder = Path(str(options["output_dir"])).parent.parent
    inside = [Path(str(name)) for name in named if name and Path(str(name)).is_relative_to(run_folder)]
    end = time.monotonic() + SECONDS_TO_BE_SEEN
    while missing := [path for path in inside if not path.exists()]:
        if time.monotonic() > end:
            raise UserError(
                f"{missing[0]}: not there on machine {machine}; the run folder has to be on a file system that all "
                "machines share, and the command be started in the same folder"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _wait_for_parting(store: Any, others: int) -> None:
    """Keep the store until the others have read the end; those that are gone are not waited for."""
    end = time.monotonic() + SECONDS_TO_PART
    while int(store.add("parted", 0)) < others and time.monotonic() < end:
        time.sleep(0.1)
