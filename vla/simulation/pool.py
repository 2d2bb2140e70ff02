"""A pool of environments, each in a separate worker.

Owns: the requests to a worker (`EnvServer`), and waiting for replies. A worker that crashes, hangs or is killed is
replaced; the reply to its request is a `Fault`, and all other workers continue. It does not know policies, the order of
episodes, results, or where workers run (`hosts`).

`Pool.exchange` waits for all replies, so that results do not depend on the speed of workers. `Pool.completed` returns
replies as they arrive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla.config import AdapterConfig, HostsConfig
from vla.errors import DataError, SimulatorError
from vla.simulation import adapter as simulator
from vla.simulation import ray_hosts  # noqa: F401  (registers its backend)
from vla.simulation.clips import Recorder
from vla.simulation.hosts import BACKENDS, Fault
from vla.spec import Observation
from vla.support import machine

PATIENCE_S = 300.0  # timeout per request


@dataclasses.dataclass(frozen=True)
class Description:
    """An environment's RobotSpec as a dict, and its GL implementation."""

    robot: dict[str, Any]
    gl: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ResetResult:
    """Result of a reset. Two machines with the same `image_hash` render the same images."""

    observation: Observation
    instruction: str
    image_hash: str


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Result of executing a chunk, up to the end of the episode.

    Attributes:
        observation: observation after the last action; it may have no images if the episode ended early.
        rewards: one reward per executed action.
        success: whether the task is solved after the last action.
        ever: whether the task is solved after any of the actions.
        reached: the object that the robot acted on last (info["reached"]); None if it is not reported.
        target: the object in the instruction (info["target"]); None if it is not reported.
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


class Pool:
    """A pool of `size` workers, as a context manager that ends them on exit.

    Args:
        adapter: adapter of the environments.
        hosts: where the workers run.
        server: subclass of `EnvServer` with additional requests; None: `EnvServer`.
        patience_s: timeout per request in seconds.
    Raises:
        ConfigError: the backend does not exist or cannot be reached.
    """

    def __init__(
        self,
        size: int,
        adapter: AdapterConfig,
        hosts: HostsConfig | None = None,
        server: type[EnvServer] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._adapter, self._server, self._patience_s = adapter, server or EnvServer, patience_s
        hosts = hosts or HostsConfig()
        self._backend = BACKENDS.get(hosts.backend)(hosts, size)
        self._workers = [self._backend.start(self._server, adapter) for _ in range(size)]
        self._deadlines: dict[int, float] = {}  # by slot: deadlines of the requests without a reply

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._deadlines:
            self._workers[slot].kill()
        self._backend.close([worker for slot, worker in enumerate(self._workers) if slot not in self._deadlines])

    @property
    def idle(self) -> list[int]:
        """Slots of the workers without a request."""
        return [slot for slot in range(len(self)) if slot not in self._deadlines]

    def exchange(self, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Send each worker its request and wait for all replies.

        Requests and their replies: ("make", env_id) -> Description; ("reset", env_id, seed, record) -> ResetResult;
        ("run", actions [n, D]) -> StepResult; ("clip", fps) -> mp4 bytes. The reply to a failed request is a `Fault`.
        """
        for slot, request in requests.items():
            self.submit(slot, request)
        replies: dict[int, Any] = {}
        while not requests.keys() <= replies.keys():
            replies |= self.completed()
        return {slot: replies[slot] for slot in requests}

    def submit(self, slot: int, request: tuple[Any, ...]) -> None:
        """Send a request to an idle worker; `completed` returns the reply."""
        self._workers[slot].send(request)
        self._deadlines[slot] = time.monotonic() + self._patience_s

    def completed(self, timeout: float = 1.0) -> dict[int, Any]:
        """Wait up to `timeout` seconds until a worker replies. Returns the replies (possibly none) by slot."""
        waiting = {slot: self._workers[slot] for slot in self._deadlines}
        remaining = min(self._deadlines.values(), default=0.0) - time.monotonic()
        ready = self._backend.ready(list(waiting.values()), max(0.0, min(timeout, remaining)))
        replies = {}
        for slot, worker in waiting.items():
            if worker in ready:
                replies[slot] = worker.receive()
            elif time.monotonic() > self._deadlines[slot]:
                replies[slot] = Fault("the environment did not respond in time, so its process was killed", "died")
        for slot, reply in replies.items():
            del self._deadlines[slot]
            if isinstance(reply, Fault) and reply.kind == "died":
                self._workers[slot].kill()
                self._workers[slot] = self._backend.start(self._server, self._adapter)
        return replies


class EnvServer:
    """A worker's environment, and the recording of its episode. Its methods are the requests.

    Attributes:
        env: the current environment; None before the first one and after a failure.
        steps: number of steps started in this episode.
    """

    def __init__(self, adapter: AdapterConfig) -> None:
        self._adapter = adapter
        self._recorder: Recorder | None = None
        self.env: simulator.SimulatedRobot | None = None
        self.steps = 0

    def answer(self, request: tuple[Any, ...]) -> Any:
        """The reply to `(method, *arguments)`. If the method raises an exception, the environment is discarded, and the
        reply is a `Fault`."""
        method, *arguments = request
        try:
            return getattr(self, method)(*arguments)
        except Exception as error:
            self.abandon()
            return Fault.of(error, self.steps)

    def make(self, env_id: str) -> Description:
        env = self._ready(env_id)  # renders an image, so that the GL implementation is known
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
        for number, action in enumerate(actions, 1):
            self.steps += 1
            # The policy only needs the images after the last action; a video needs all.
            images = number == len(actions) or self._recorder is not None
            observation, reward, terminated, truncated, info = env.step(action, images)
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
        """Discard the environment, and ignore errors from closing it."""
        env, self.env = self.env, None
        with contextlib.suppress(Exception):
            if env is not None:
                env.close()

    def _ready(self, env_id: str) -> simulator.SimulatedRobot:
        if self.env is None or self.env.env_id != env_id:
            self.abandon()
            self.env = simulator.make(env_id, self._adapter)
        return self.env


def check_shared(folder: Path) -> None:
    """Raise DataError if this worker's machine cannot access a folder of the caller."""
    if not folder.is_dir():
        raise DataError(
            f"a worker on {platform.node()} must write to {folder}, but cannot access it. Choose an --out in a folder "
            "that all machines of the cluster share."
        )


def _label(value: Any) -> int | str | None:
    """`value` if it is an integer or a string, else None."""
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
