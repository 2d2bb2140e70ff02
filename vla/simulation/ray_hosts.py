"""Workers as actors of a Ray cluster (https://docs.ray.io), on one or several machines.

Owns: the connection to the cluster, the actors, and the conversion of Ray's errors to a `Fault` or a ConfigError. Ray
is an optional dependency, imported only if this backend is used.
"""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vla import __version__
from vla.config import HostsConfig
from vla.errors import ConfigError
from vla.simulation.hosts import BACKENDS, Fault, Server
from vla.support import machine

CONNECT_S = 5.0  # timeout for the connection to a cluster's address


@BACKENDS.register("ray")
class Actors:
    """Workers in a Ray cluster, with one CPU each. Without an address, a cluster is started on this machine, and shut
    down at the end.

    Raises:
        ConfigError: Ray is not installed, there is no cluster at the address, or it has fewer CPUs than workers.
    """

    def __init__(self, config: HostsConfig, size: int) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage statistics by default
            import ray
        except ImportError as error:
            raise ConfigError(
                f"--backend ray needs Ray, which cannot be imported ({error}). Install it on every machine of the "
                "cluster: pip install '.[ray]' in the checkout of this package."
            ) from None
        self._ray: Any = ray
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect(config.address, size)
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if cpus < size:
            self.close([])
            raise ConfigError(
                f"the Ray cluster has {cpus} CPUs, but {size} workers need one each. Add machines to it (`ray start "
                "--address ...`), or use fewer workers (--n-envs, --workers of `vla collect`)."
            )
        self._actor = self._ray.remote(num_cpus=1)(_Actor)

    def start(self, make_server: Callable[..., Server], *arguments: Any) -> _RayWorker:
        place = (__version__, str(Path.cwd()), os.environ.get("MUJOCO_GL"))
        return _RayWorker(self._ray, self._actor.remote(place, make_server, arguments))

    def ready(self, workers: Sequence[_RayWorker], timeout: float) -> list[_RayWorker]:
        by_reply = {worker.reply: worker for worker in workers}
        found, _ = self._ray.wait(list(by_reply), timeout=timeout)
        return [by_reply[reply] for reply in found]

    def close(self, idle: Sequence[_RayWorker]) -> None:
        for worker in idle:
            worker.kill()
        if self._ours:
            self._ray.shutdown()

    def _connect(self, address: str | None, size: int) -> None:
        quiet: dict[str, Any] = {"logging_level": "warning", "include_dashboard": False}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if address is None:
                self._ray.init("local", num_cpus=max(size, machine.cores()), **quiet)
            else:
                _check_port(address)
                self._ray.init(address, logging_level="warning")
        except Exception as error:  # Ray has no common error type
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            where = "on this machine" if address is None else f"at {address!r}"
            raise ConfigError(
                f"cannot use a Ray cluster {where} ({reason}). Start a cluster with `ray start --head`, which prints "
                "its address, or omit --address to start one on this machine. For a cluster with token authentication, "
                "set RAY_AUTH_MODE=token."
            ) from error
        finally:
            with contextlib.suppress(ValueError):  # not the main thread, so Ray has not changed the handler
                signal.signal(signal.SIGTERM, handler)


class _RayWorker:
    """The caller's side of an actor. `reply` is the future of its reply."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.reply: Any = None

    def send(self, request: tuple[Any, ...]) -> None:
        self.reply = self._actor.answer.remote(request)

    def receive(self) -> Any:
        try:
            return copy.deepcopy(self._ray.get(self.reply))  # Ray's arrays are read-only
        except self._ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1].strip()
            if getattr(error, "actor_init_failed", False):
                return Fault.of(
                    ConfigError(
                        f"a Ray worker cannot start ({last}). Every machine of the cluster needs this package, version "
                        f"{__version__}, with its `ray` extra."
                    )
                )
            return Fault(f"the worker's Ray actor died ({type(error).__name__}: {last})", "died")

    def kill(self) -> None:
        self._ray.kill(self._actor)


class _Actor:
    """Runs a server in a process of the cluster, with the caller's working directory and GL backend.

    Args:
        place: the caller's version of this package, working directory and GL backend.
    """

    def __init__(
        self, place: tuple[str, str, str | None], make_server: Callable[..., Server], arguments: tuple[Any, ...]
    ) -> None:
        version, folder, gl = place
        if version != __version__:
            raise ConfigError(f"vla {__version__} is installed on {platform.node()}, but {version} is needed.")
        with contextlib.suppress(OSError):  # the folder may not exist on this machine
            os.chdir(folder)
        if gl is not None:
            os.environ["MUJOCO_GL"] = gl  # before an environment imports MuJoCo
        self._server = make_server(*arguments)

    def answer(self, request: tuple[Any, ...]) -> Any:
        return self._server.answer(copy.deepcopy(request))  # Ray's arrays are read-only


def _check_port(address: str) -> None:
    """Raise OSError if "host:port" does not accept connections. Ray would wait for minutes, and may end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
