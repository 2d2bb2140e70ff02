"""A pool of environments, each in a process of its own.

Owns: the processes, which execute one action chunk per request, and turning any failure (an exception, a crash, a hang,
a kill) into a `Fault` without disturbing the other environments. It does not know policies, the order of episodes or
results.

`Pool.exchange` sends requests to many workers and waits for all replies, so the results do not depend on the relative
speed of the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import multiprocessing
import signal
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vla.config import AdapterConfig
from vla.errors import SimulatorError, VLAError
from vla.simulation import adapter as simulator
from vla.simulation.clips import Recorder
from vla.spec import Observation
from vla.support import machine

PATIENCE_S = 300.0  # time limit per request; beyond it, the worker counts as hung


@dataclasses.dataclass(frozen=True)
class Description:
    """An environment's RobotSpec as a dict, and the GL implementation that renders it."""

    robot: dict[str, Any]
    gl: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ResetResult:
    """Result of a reset. Compare `image_hash` to check whether two machines render the same images."""

    observation: Observation
    instruction: str
    image_hash: str


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Result of executing a chunk, up to the end of the episode.

    Attributes:
        observation: observation after the last action.
        rewards: one reward per executed action.
        success: whether the task is solved after the last action; `ever`: after any of the actions.
        reached: the last candidate acted on (info["reached"]); None if the environment does not report it.
        target: the candidate that the instruction names (info["target"]); None if it is not reported.
    """

    observation: Observation
    instruction: str
    rewards: list[float]
    success: bool
    ever: bool
    terminated: bool
    truncated: bool
    reached: int | str | None
    target: int | str | None


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a request failed.

    Attributes:
        expected: whether this is an error of this package, whose message is sufficient.
        step: the step of the episode that raised the error, starting at 1; None if it is unknown (the process ended).
    """

    message: str
    expected: bool = False
    step: int | None = None


class Pool:
    """A pool of `size` workers. A context manager; it ends all processes on exit.

    Args:
        adapter: adapter of the environments.
        patience_s: time limit per request in seconds.
        host: class that answers requests in a worker; a subclass of `EnvServer` can add requests.
    """

    def __init__(
        self, size: int, adapter: AdapterConfig, patience_s: float = PATIENCE_S, host: type[EnvServer] | None = None
    ) -> None:
        self._adapter, self._patience_s, self._host = adapter, patience_s, host or EnvServer
        # Not a plain fork, which copies GL contexts and locks of this process and hangs. A fork server is a clean,
        # single-threaded process that imports the modules once.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(["vla.simulation.pool"])
        self._workers = [_Worker(self._context, adapter, self._host) for _ in range(size)]

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.stop()

    def exchange(self, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Send each worker its request and wait for all replies; the reply of a failed worker is a `Fault`.

        Requests and their replies: ("make", env_id) -> Description; ("reset", env_id, seed, record) -> ResetResult;
        ("run", actions [n, D]) -> StepResult; ("clip", fps) -> mp4 bytes.
        """
        deadline = time.monotonic() + self._patience_s
        for slot, request in requests.items():
            self._workers[slot].send(request)
        replies = {slot: self._workers[slot].receive(deadline) for slot in requests}
        for slot in requests:
            if not self._workers[slot].alive:
                self._workers[slot].stop()
                self._workers[slot] = _Worker(self._context, self._adapter, self._host)
        return replies


class _Worker:
    """The parent's side of a worker."""

    def __init__(self, context: Any, adapter: AdapterConfig, host: type[EnvServer]) -> None:
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, adapter, host)
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="vla-environment")
        self._process.start()
        theirs.close()
        self.alive = True

    def send(self, request: tuple[Any, ...]) -> None:
        with contextlib.suppress(OSError):  # `receive` detects a dead worker and reports how it died
            self._pipe.send(request)

    def receive(self, deadline: float) -> Any:
        try:
            if self._pipe.poll(max(0.0, deadline - time.monotonic())):
                return self._pipe.recv()
            fault = "the environment did not respond in time; its process was killed"
        except (EOFError, OSError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            fault = f"the environment's process died ({how})"
        self.alive = False
        return Fault(fault)

    def close(self) -> None:
        """Close the connection; an idle worker then exits by itself."""
        self._pipe.close()

    def stop(self) -> None:
        """Make sure that the process has ended."""
        self.close()
        self._process.join(timeout=2 if self.alive else 0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, adapter: AdapterConfig, kind: type[EnvServer]) -> None:
    """Main loop of a worker process: answer requests until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    host = kind(adapter)
    with contextlib.suppress(EOFError, OSError):
        while True:
            verb, *arguments = pipe.recv()
            try:
                reply = getattr(host, verb)(*arguments)
            except Exception as error:
                known = isinstance(error, VLAError)
                message = str(error) if known else f"{type(error).__name__}: {error}"
                reply = Fault(message, known, host.steps if verb == "run" else None)
                host.abandon()
            pipe.send(reply)
    host.abandon()


class EnvServer:
    """A worker's environment, and the recording of its episode. The methods implement the requests.

    Attributes:
        env: the current environment; None before the first one and after a failure.
        steps: number of steps started in this episode.
    """

    def __init__(self, adapter: AdapterConfig) -> None:
        self._adapter = adapter
        self._recorder: Recorder | None = None
        self.env: simulator.SimulatedRobot | None = None
        self.steps = 0

    def make(self, env_id: str) -> Description:
        env = self._ready(env_id)  # creating it has rendered an image, so the GL context can report its name
        return Description(env.robot.to_dict(), machine.gl())

    def reset(self, env_id: str, seed: int, record: bool) -> ResetResult:
        observation, info = self._ready(env_id).reset(seed=seed)
        self._recorder = Recorder() if record else None
        self.steps = 0
        if self._recorder:
            self._recorder.add(observation)
        images = hashlib.sha256(b"".join(np.ascontiguousarray(i).tobytes() for i in observation["pixels"].values()))
        return ResetResult(observation, info["instruction"], images.hexdigest()[:16])

    def run(self, actions: np.ndarray) -> StepResult:
        env = self.env
        if env is None:
            raise SimulatorError("no episode is running: call reset first.")
        rewards: list[float] = []
        ever, reached = False, None
        for action in actions:
            self.steps += 1
            observation, reward, terminated, truncated, info = env.step(action)
            if not math.isfinite(reward):
                raise SimulatorError(f"environment {env.env_id!r}: rewards must be finite, got {reward}.")
            rewards.append(reward)
            ever |= info["is_success"]
            now = _label(info.get("reached"))
            reached = reached if now in (None, -1) else now
            if self._recorder:
                self._recorder.add(observation)
            if terminated or truncated:
                break
            env.check_length(self.steps)
        return StepResult(
            observation=observation,
            instruction=info["instruction"],
            rewards=rewards,
            success=info["is_success"],
            ever=ever,
            terminated=terminated,
            truncated=truncated,
            reached=reached,
            target=_label(info.get("target")),
        )

    def clip(self, fps: float) -> bytes:
        return self._recorder.mp4(fps) if self._recorder else b""

    def abandon(self) -> None:
        """Discard an environment that failed; errors from closing it are ignored."""
        env, self.env = self.env, None
        with contextlib.suppress(Exception):
            if env is not None:
                env.close()

    def _ready(self, env_id: str) -> simulator.SimulatedRobot:
        if self.env is None or self.env.env_id != env_id:
            self.abandon()
            self.env = simulator.make(env_id, self._adapter)
        return self.env


def _label(value: Any) -> int | str | None:
    """`value` if it is the number or name of a candidate; None for other values that an environment may use."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
