"""Run `vla <verb>` in a separate process, forked from one that has imported torch and all jobs.

A forked process starts at once; a new interpreter would take seconds. Signals, exit status, output and workers behave
as in a normal process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
JOBS = ("train", "rollout", "collect", "dagger", "benchmark", "quickstart", "replay", "deploy", "serve", "export")


class Process:
    """A running `vla`, with a part of the interface of `subprocess.Popen`. It leads its own process group."""

    def __init__(self, server: Path, arguments: list[str], env: Mapping[str, str], cwd: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(server))
        self._files = [server.parent / f"{uuid.uuid4()}.{name}" for name in ("out", "err")]
        for file in self._files:
            file.touch()
        order = {
            "arguments": arguments,
            "env": {**os.environ, **env},
            "files": list(map(str, self._files)),
            "cwd": str(cwd),
        }
        self._server.sendall(json.dumps(order).encode() + b"\n")
        self._replies = self._server.makefile("rb", buffering=0)  # `poll` cannot see buffered data
        self.pid = int(self._replies.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.returncode = int(self._replies.readline())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("vla", timeout, *self.said())
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        out, err = (file.read_text() for file in self._files)
        return out, err


@pytest.fixture(scope="session")
def start_vla(tmp_path_factory) -> Iterator[Any]:
    """`start_vla("train", "--data", path, ..., env={...})`: a `Process`. `start_vla("-c", code, ...)` runs Python."""
    address = tmp_path_factory.mktemp("forked") / "server"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # avoids oversubscription
    command = [sys.executable, "-m", "tests.forked", address]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE) as server:
        started: list[Process] = []

        def start(*arguments: str | Path | int, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
            while not address.exists():
                assert server.poll() is None, "the fork server has exited"
                time.sleep(0.01)
            started.append(Process(address, list(map(str, arguments)), env or {}, cwd))
            return started[-1]

        yield start
        for process in started:
            process.kill()
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="session")
def run_vla(start_vla) -> Any:
    """`run_vla("collect", ...)`: what `subprocess.run` returns."""

    def run(*arguments: str | Path | int, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        process = start_vla(*arguments)
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(["vla", *arguments], process.returncode, out, err)

    return run


def main() -> None:
    """Fork for each connection, until standard input is closed."""
    for name in (*(f"vla.jobs.{name}" for name in JOBS), "matplotlib.figure", "tests.tiny", "tests.openvla_folder"):
        importlib.import_module(name)
    gc.freeze()  # imported modules are not garbage: training collects three times
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the children are not waited for
    address = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        Path(f"{address}.new").rename(address)
        while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _attend(connection)
                os._exit(0)
            connection.close()


def _attend(connection: socket.socket) -> None:
    """Run one job, and send its process id and exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order = json.loads(connection.makefile().readline())
    job = os.fork()
    if job == 0:
        connection.close()
        _become(**order)
    with contextlib.suppress(BrokenPipeError):  # the test has ended
        connection.sendall(f"{job}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
        connection.sendall(f"{status}\n".encode())


def _become(arguments: list[str], env: dict[str, str], files: list[str], cwd: str) -> None:
    """Turn this process into `vla <arguments>`, or `python -c <code> <arguments>`."""
    from vla import cli

    os.setsid()
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), target)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.exit(exec(arguments[1], {}))
    sys.argv = ["vla", *arguments]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
