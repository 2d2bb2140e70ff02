"""A simulated robot in real time.

Owns: an environment in a separate process that does not wait for the policy. At every tick of its control rate, it
executes the latest command, or the robot's hold command if none has arrived. Inference latency therefore has the same
effect as on a real robot. It does not know policies.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vla.config import AdapterConfig
from vla.control.clock import Rate
from vla.control.robot import EpisodicRobot, Reading
from vla.errors import SimulatorError
from vla.simulation import adapter as simulator
from vla.simulation.hosts import Fault, Process
from vla.spec import RobotSpec

_PATIENCE_S = 120.0  # timeout for building a scene and rendering its first image


class SimRobot(EpisodicRobot):
    """The environment `env_id` in real time.

    The process first sends the RobotSpec. It replies to ("reset", seed) with (instruction, first reading), and sends a
    `Reading` after every tick. It does not reply to ("command", action), so neither process waits for the other.

    Attributes:
        spec: the RobotSpec of the environment.
        instruction: instruction of the current episode.
    """

    def __init__(self, env_id: str, adapter: AdapterConfig | None = None, hz: float | None = None) -> None:
        self._process = Process(_live, env_id, adapter or AdapterConfig(), hz, name="vla-sim-robot")
        self._latest: Reading | None = None
        self.instruction = ""
        try:
            self.spec = RobotSpec.from_dict(self._reply())
        except BaseException:
            self.close()
            raise

    def reset(self, seed: int) -> Reading:
        """Begin an episode; its clock starts with the returned reading."""
        self._process.send(("reset", seed))
        self.instruction, self._latest = self._reply()
        assert self._latest is not None
        return self._latest

    def observe(self) -> Reading | None:
        while self._process.poll():
            self._latest = self._receive()
        return self._latest

    def command(self, action: np.ndarray) -> None:
        self._process.send(("command", np.asarray(action, np.float32)))

    def close(self) -> None:
        self._process.close()

    def _reply(self) -> Any:
        """The reply to the last request; readings of the previous episode are dropped."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._process.poll(max(0.0, deadline - time.monotonic())):
            message = self._receive()
            if not isinstance(message, Reading):
                return message
        raise SimulatorError(f"the simulated robot did not reply within {_PATIENCE_S:g} s.")

    def _receive(self) -> Any:
        message = self._process.receive()
        if isinstance(message, Fault):
            raise message.error or SimulatorError(f"the simulated robot failed: {message.message}.")
        return message


class _Outbox:
    """Sends messages in a background thread, so that a slow reader does not delay the simulation. A new reading
    replaces an unsent one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._messages: deque[Any] = deque()
        self._wake = threading.Condition()
        threading.Thread(target=self._serve, daemon=True, name="vla-outbox").start()

    def put(self, message: Any) -> None:
        with self._wake:
            if isinstance(message, Reading) and self._messages and isinstance(self._messages[-1], Reading):
                self._messages.pop()
            self._messages.append(message)
            self._wake.notify()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the caller has closed the pipe
            while True:
                with self._wake:
                    while not self._messages:
                        self._wake.wait()
                    message = self._messages.popleft()
                self._pipe.send(message)


def _live(pipe: Connection, env_id: str, adapter: AdapterConfig, hz: float | None) -> None:
    """Run an episode after every ("reset", seed), until the caller closes the pipe."""
    outbox = _Outbox(pipe)
    try:
        env = simulator.make(env_id, adapter)
        outbox.put(env.robot.to_dict())
        message = None
        while True:
            message = message or pipe.recv()
            if message[0] == "reset":
                message = _episode(pipe, outbox, env, message[1], hz or env.robot.control_hz)
            else:  # a command of an ended episode
                message = None
    except (EOFError, OSError):
        raise
    except Exception as error:
        outbox.put(Fault.of(error))
        pipe.recv()  # wait until the caller has read the message and closed the pipe


def _episode(
    pipe: Connection, outbox: _Outbox, env: simulator.SimulatedRobot, seed: int, hz: float
) -> tuple[str, int] | None:
    """Run one episode in real time. Returns the message that ended it; None if the episode ended by itself."""
    observation, info = env.reset(seed=seed)
    rate = Rate(hz)
    outbox.put((info["instruction"], Reading(observation, time.monotonic(), info=_plain(info))))
    rate.wait()  # tick 0 is the first image
    last: np.ndarray | None = None
    while True:
        rate.wait()
        command = None
        while pipe.poll():
            message = pipe.recv()
            if message[0] == "reset":
                return message
            command = message[1]  # the newest command is used; earlier ones are dropped
        last = env.robot.hold_action(last) if command is None else command
        observation, _, terminated, truncated, info = env.step(last)
        over = terminated or truncated
        # The time of the tick: the duration of the step and of rendering must not count.
        taken = rate.deadline(rate.tick)
        outbox.put(Reading(observation, taken, over, bool(info["is_success"]), _plain(info)))
        if over:
            return None


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    """The numbers, booleans and strings in an environment's info, as Python values."""
    values = {key: value.item() if isinstance(value, np.generic) else value for key, value in info.items()}
    return {key: value for key, value in values.items() if isinstance(value, bool | int | float | str)}
