"""Worker processes, and the backends that start them.

Owns: the message protocol, and processes with a pipe. A request is `(method, *arguments)`; its reply is a value, or a
`Fault` if the request failed or the worker died. It does not know environments or the methods of requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

from vla.config import HostsConfig
from vla.errors import VLAError
from vla.support.registry import Registry


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a request failed.

    Attributes:
        kind: "error": the request raised an exception. "died": the worker crashed, hung or was killed.
        error: the exception, if it is a VLAError.
        step: the step of the episode in which the exception was raised; None for "died".
    """

    message: str
    kind: Literal["error", "died"] = "error"
    error: VLAError | None = None
    step: int | None = None

    @classmethod
    def of(cls, error: Exception, step: int | None = None) -> Fault:
        if isinstance(error, VLAError):
            return cls(str(error), error=error, step=step)
        return cls(f"{type(error).__name__}: {error}", step=step)


class Server(Protocol):
    """The object in a worker that executes requests. `answer` returns a `Fault` instead of raising an exception."""

    def answer(self, request: tuple[Any, ...]) -> Any: ...

    def abandon(self) -> None: ...


class Worker(Protocol):
    """The caller's side of a worker. It executes one request at a time."""

    def send(self, request: tuple[Any, ...]) -> None: ...

    def receive(self) -> Any:
        """Wait for the reply and return it; a `Fault` of kind "died" if the worker dies."""

    def kill(self) -> None:
        """Kill the worker."""


class Backend(Protocol):
    """Where workers run."""

    def start(self, make_server: Callable[..., Server], *arguments: Any) -> Worker:
        """Start a worker that runs `make_server(*arguments)`."""

    def ready(self, workers: Sequence[Any], timeout: float) -> list[Any]:
        """Wait up to `timeout` seconds for a reply or the death of a worker. Returns the workers that can `receive`."""

    def close(self, idle: Sequence[Any]) -> None:
        """End idle workers, and release the backend's resources."""


#: Backends by name, called with the configuration and the number of workers.
BACKENDS: Registry[Callable[[HostsConfig, int], Backend]] = Registry("backend")


class Process:
    """A process on this machine, and the caller's end of its pipe.

    Args:
        target: called in the process with the other end of the pipe and `arguments`.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, name: str) -> None:
        # A plain fork could hang, because it copies GL contexts and locks. A fork server is single-threaded, and
        # imports the modules once.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["vla.simulation.pool"])
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(target, theirs, *arguments), daemon=True, name=name)
        self._process.start()
        theirs.close()

    def send(self, request: tuple[Any, ...]) -> None:
        with contextlib.suppress(OSError):  # `receive` reports a dead process
            self.pipe.send(request)

    def poll(self, timeout: float = 0.0) -> bool:
        """Wait up to `timeout` seconds for a message. Returns whether `receive` would return immediately."""
        try:
            return self.pipe.poll(timeout)
        except (EOFError, OSError):
            return True  # `receive` returns a `Fault`

    def receive(self) -> Any:
        """The next message; a `Fault` if the process is dead."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            return Fault(f"the worker process died ({how})", "died")

    def kill(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.join()

    def close(self, patience_s: float = 2.0) -> None:
        """Close the pipe, so that the process exits; kill it after `patience_s` seconds."""
        self.pipe.close()
        self._process.join(patience_s)
        self.kill()


def _run(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    """The main function of a process. It runs until the caller closes the pipe."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # these reach the whole process group, but the caller handles them
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        target(pipe, *arguments)


def _serve(pipe: Connection, make_server: Callable[..., Server], *arguments: Any) -> None:
    """Answer requests until the caller closes the pipe."""
    server = make_server(*arguments)
    try:
        while True:
            pipe.send(server.answer(pipe.recv()))
    finally:
        server.abandon()


@BACKENDS.register("local")
class Processes:
    """Workers in processes on this machine."""

    def __init__(self, config: HostsConfig, size: int) -> None: ...

    def start(self, make_server: Callable[..., Server], *arguments: Any) -> Process:
        return Process(_serve, make_server, *arguments, name="vla-environment")

    def ready(self, workers: Sequence[Process], timeout: float) -> list[Process]:
        found = connection.wait([worker.pipe for worker in workers], timeout)
        return [worker for worker in workers if worker.pipe in found]

    def close(self, idle: Sequence[Process]) -> None:
        for worker in idle:
            worker.pipe.close()
        for worker in idle:
            worker.close()
