"""A simulated robot in real time.

Owns: an environment in a process of its own that does not wait for the policy: at every tick of its control rate it
takes a step with the latest command, or with the robot's hold command. Inference latency therefore has the same effect
as on a real robot. It does not know policies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vla.config import AdapterConfig
from vla.control.clock import Rate
from vla.control.robot import EpisodicRobot, Reading
from vla.errors import SimulatorError, VLAError
from vla.simulation import adapter as simulator
from vla.spec import RobotSpec

_PATIENCE_S = 120.0  # to build a scene and render its first image


class SimRobot(EpisodicRobot):
    """The environment `env_id` in real time. Use it as a context manager.

    Attributes:
        spec: its RobotSpec.
        instruction: of the current episode.
    """

    def __init__(self, env_id: str, adapter: AdapterConfig | None = None, hz: float | None = None) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, env_id, adapter or AdapterConfig(), hz)
        self._process = context.Process(target=_live, args=arguments, daemon=True, name="vla-sim-robot")
        self._process.start()
        theirs.close()
        self._latest: Reading | None = None
        self.instruction = ""
        try:
            self.spec = RobotSpec.from_dict(self._answer("spec"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SimRobot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, seed: int) -> Reading:
        """Begin an episode; its clock starts with the returned reading."""
        self._pipe.send(("reset", seed))
        self.instruction, self._latest = self._answer("began")
        assert self._latest is not None
        return self._latest

    def observe(self) -> Reading | None:
        try:
            while self._pipe.poll():
                kind, value = self._pipe.recv()
                if kind == "reading":
                    self._latest = value
                elif kind == "error":
                    raise SimulatorError(value)
        except (EOFError, OSError):
            raise SimulatorError("the simulated robot's process died.") from None
        return self._latest

    def command(self, action: np.ndarray) -> None:
        try:
            self._pipe.send(("command", np.asarray(action, np.float32)))
        except OSError:
            raise SimulatorError("the simulated robot's process died.") from None

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, kind: str) -> Any:
        """The next message of this kind; readings of the previous episode are dropped."""
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while self._pipe.poll(max(0.0, deadline - time.monotonic())):
                found, value = self._pipe.recv()
                if found == "error":
                    raise SimulatorError(value)
                if found == kind:
                    return value
        except (EOFError, OSError):
            raise SimulatorError("the simulated robot's process died.") from None
        raise SimulatorError(f"the simulated robot did not answer in {_PATIENCE_S:g} s.")


class _Outbox:
    """Sends from a thread of its own: a slow reader never stops the simulation. Only the latest reading is kept."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._messages = pipe, deque[tuple[str, Any]]()
        self._wake = threading.Condition()
        threading.Thread(target=self._serve, daemon=True, name="vla-outbox").start()

    def put(self, kind: str, value: Any) -> None:
        with self._wake:
            if kind == "reading" and self._messages and self._messages[-1][0] == "reading":
                self._messages.pop()
            self._messages.append((kind, value))
            self._wake.notify()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                with self._wake:
                    while not self._messages:
                        self._wake.wait()
                    message = self._messages.popleft()
                self._pipe.send(message)


def _live(pipe: Connection, env_id: str, adapter: AdapterConfig, hz: float | None) -> None:
    """The process: an episode after every ("reset", seed), until the other end is closed."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the parent decides
        signal.signal(signum, signal.SIG_IGN)
    outbox = _Outbox(pipe)
    with contextlib.suppress(EOFError, OSError):
        try:
            env = simulator.make(env_id, adapter)
            outbox.put("spec", env.robot.to_dict())
            message = None
            while True:
                message = message or pipe.recv()
                if message[0] == "reset":
                    message = _episode(pipe, outbox, env, message[1], hz or env.robot.control_hz)
                else:  # a command to an episode that has ended
                    message = None
        except (EOFError, OSError):
            raise
        except Exception as error:
            outbox.put("error", str(error) if isinstance(error, VLAError) else f"{type(error).__name__}: {error}")
            pipe.recv()  # wait until the other end is closed, so that the message is read


def _episode(
    pipe: Connection, outbox: _Outbox, env: simulator.SimulatedRobot, seed: int, hz: float
) -> tuple[str, int] | None:
    """Run one episode in real time; returns the message that ended it, None when it ended by itself."""
    observation, info = env.reset(seed=seed)
    rate = Rate(hz)
    outbox.put("began", (info["instruction"], Reading(observation, time.monotonic(), info=_plain(info))))
    rate.wait()  # tick 0 is the first image
    last: np.ndarray | None = None
    while True:
        rate.wait()
        command = None
        while pipe.poll():
            message = pipe.recv()
            if message[0] == "reset":
                return message
            command = message[1]  # the newest; a command that missed its tick is dropped
        last = env.robot.hold_action(last) if command is None else command
        observation, _, terminated, truncated, info = env.step(last)
        over = terminated or truncated
        # The observation is of the tick, however long the step and the rendering take.
        taken = rate.deadline(rate.tick)
        outbox.put("reading", Reading(observation, taken, over, bool(info["is_success"]), _plain(info)))
        if over:
            return None


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """The numbers, flags and texts in an environment's info, as Python values."""
    values = {key: value.item() if isinstance(value, np.generic) else value for key, value in info.items()}
    return {key: value for key, value in values.items() if isinstance(value, bool | int | float | str)}
