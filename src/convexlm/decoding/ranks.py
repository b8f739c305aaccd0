"""Decoding over machines: the processes of torchrun, `accelerate launch` or SLURM as workers of rank 0.

Rank 0 does what a single process does: it alone reads the job list, writes files and speaks. The others connect to it
and take work as local worker processes do. They find it through torch's rendezvous (`MASTER_ADDR`, `MASTER_PORT`),
over which it tells them its port and a password.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    import queue
    from types import TracebackType

KEY = "convexlm/decode"
PATIENCE = timedelta(minutes=10)
"""How long the ranks wait for each other at the start."""
GREETING_SECONDS = 60.0
LINGER_SECONDS = 10.0
"""Rank 0 does not end before the others have come, for so long at most: they would miss it, and wait."""
_NAMES = (
    ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
    ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
)
"""torchrun's variables, and those of Open MPI, Intel MPI and MVAPICH, which `accelerate launch` uses on CPUs."""
FIRST_REMOTE = 1_000_000
"""Numbers of remote workers begin here, those of local ones at 0."""


@dataclass(frozen=True)
class World:
    """The processes that a launcher started.

    Attributes:
        rank: which of them this one is.
        size: how many there are.
        local_rank: which of those on this machine this one is.
    """

    rank: int
    size: int
    local_rank: int


def find_world() -> World | None:
    """What a launcher says in `WORLD_SIZE`, `RANK` and `LOCAL_RANK`, or MPI in its own; None for a process alone.

    Raises:
        UserError: they do not fit together.
    """
    sizes, ranks, local_ranks = (_set_name(names) for names in _NAMES)
    size = _number(sizes, 1)
    if size <= 1:
        return None
    if lacking := [name for name in (ranks, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"{sizes} is {size}, but {lacking[0]} is not set; start with torchrun or accelerate launch, or set "
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    rank = _number(ranks, 0)
    if not 0 <= rank < size:
        raise UserError(f"{ranks} is {rank}, with a {sizes} of {size}")
    # torch's rendezvous reads them itself.
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank))
    return World(rank, size, _number(local_ranks, 0))


def _set_name(names: tuple[str, ...]) -> str:
    """The first of some variables that is set, or the first."""
    return next((name for name in names if os.environ.get(name)), names[0])


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise UserError(f"{name} must be a number, not {value!r}")
    return int(value)


class Leader:
    """Rank 0's side: lets the other ranks in. As a context manager it is open from the start to the end of the verb.

    Args:
        world: a world of more than one process.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.others = world.size - 1
        self._password = secrets.token_hex(16)
        self._inbox: queue.Queue[Any] | None = None
        self._waiting: list[socket.socket] = []
        self._number = FIRST_REMOTE
        self._lock = threading.Lock()
        self._all_here = threading.Event()
        self._joined = 0

    def __enter__(self) -> Leader:
        """Listen, and tell the other ranks where.

        Raises:
            UserError: they cannot be reached.
        """
        self._store = _rendezvous(self.world)
        host = os.environ["MASTER_ADDR"]
        here = host in ("localhost", "127.0.0.1", "::1")
        try:
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            everywhere = "::" if family == socket.AF_INET6 else ""
            self._listener = socket.create_server((host if here else everywhere, 0), family=family)
        except OSError as error:
            raise UserError(f"rank 0 cannot listen on {host} ({error.strerror or error})") from None
        threading.Thread(target=self._accept, daemon=True).start()
        self._store.set(KEY, f"{self._listener.getsockname()[1]} {self._password}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of all ranks: of those that are still on their way, too."""
        self._all_here.wait(LINGER_SECONDS)
        self._listener.close()
        with self._lock:
            for connection in self._waiting:
                connection.close()

    def deliver_to(self, inbox: queue.Queue[Any]) -> None:
        """Put (number, (connection,)) on the queue for every rank, from now on and as they come in."""
        with self._lock:
            self._inbox = inbox
            for connection in self._waiting:
                self._deliver(connection)
            self._waiting = []

    def _deliver(self, connection: socket.socket) -> None:
        assert self._inbox is not None
        self._inbox.put((self._number, (connection,)))
        self._number += 1

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(GREETING_SECONDS)
            word = b""
            while len(word) < len(self._password) and (more := connection.recv(len(self._password) - len(word))):
                word += more
            connection.settimeout(None)
        except OSError:
            word = b""
        if not hmac.compare_digest(word, self._password.encode()):
            connection.close()
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with self._lock:
            if self._inbox is None:
                self._waiting.append(connection)
            else:
                self._deliver(connection)
            self._joined += 1
            if self._joined == self.others:
                self._all_here.set()


def follow(world: World) -> None:
    """What every rank but 0 does: work for rank 0 until that lets go of it.

    Rank 0 says whatever is to be said, so an end of its connection is no error here.

    Raises:
        UserError: rank 0 is not to be found.
    """
    from convexlm.decoding.worker import serve

    store = _rendezvous(world)
    try:
        port, password = store.get(KEY).decode().split(" ")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"rank {world.rank}: rank 0 did not say where it listens ({_first_line(error)})") from None
    try:
        connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), GREETING_SECONDS)
    except OSError:
        return  # rank 0 was done, or refused, before we came
    with connection:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.sendall(password.encode())
        # A connection that rank 0 closed while we were telling it something.
        with contextlib.suppress(ConnectionError):
            reader, writer = connection.makefile(encoding="ascii"), connection.makefile("w", encoding="ascii")
            serve(reader, writer, world.local_rank)


def _rendezvous(world: World) -> Any:
    """The store that all ranks share."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=PATIENCE))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"rank {world.rank} cannot meet the other ranks ({_first_line(error)})") from None
    store.set_timeout(PATIENCE)
    return store


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
