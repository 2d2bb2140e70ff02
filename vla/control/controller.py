"""The control loop.

Owns: the order of things in a tick (look, ask, choose, check, command), when a new chunk is asked for, and the record
of a run. Deadlines are `clock`'s, thinking is `inference`'s, limits are `safety`'s: each tick takes what is there at
that moment and always sends a command.

Actions carry the tick they are for. A chunk for the observation of tick k speaks about ticks k, k + 1, ..., and is
ready some ticks later; what it says about the ticks in between is dropped. With the "committed" seam those ticks'
actions, which are executed while it is decoded, are given to the decoder as the chunk's first tokens: an autoregressive
policy continues them exactly, at no cost.
"""

from __future__ import annotations

import enum
import gc
import math
import time
from typing import Any

import numpy as np

from vla.config import ControlConfig
from vla.control.buffer import SEAMS, ChunkBuffer
from vla.control.clock import Rate
from vla.control.inference import Answer, Inference
from vla.control.robot import Reading, Robot
from vla.control.safety import SafetyFilter
from vla.errors import ConfigError, SpecError
from vla.memory import Memory
from vla.policy import Policy


class State(enum.Enum):
    """ready -> running <-> holding -> stopped."""

    READY = "ready"
    RUNNING = "running"
    HOLDING = "holding"
    STOPPED = "stopped"


class Controller:
    """Drives `robot` with `policy`. Use it as a context manager; `run` may be called many times.

    Attributes:
        state: see `State`.
        safety: its interventions, and the emergency stop.
        instruction: what the policy is told; may be changed while it runs.
    """

    def __init__(self, robot: Robot, policy: Policy, config: ControlConfig) -> None:
        if config.seam not in SEAMS:
            raise ConfigError(f"seam must be one of {', '.join(SEAMS)}, got {config.seam!r}.")
        ours, theirs = policy.robot, robot.spec
        if len(ours.action_names) != len(theirs.action_names) or set(ours.cameras) - set(theirs.cameras):
            raise SpecError(
                f"the policy commands {', '.join(ours.action_names)} and sees {', '.join(ours.cameras)}; the robot "
                f"takes {', '.join(theirs.action_names)} and has {', '.join(theirs.cameras)}."
            )
        self._robot, self._policy, self._config = robot, policy, config
        ends = np.stack([-np.ones(ours.action_dim), np.ones(ours.action_dim)])
        low, high = policy.processor.unnormalize(ends, policy.unnorm_key)
        self.safety = SafetyFilter(theirs, config.safety, np.minimum(low, high), np.maximum(low, high))
        self.state, self.instruction = State.READY, ""
        self._hz = config.hz or theirs.control_hz
        self._inference = Inference(policy)
        policy.warm_up()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.state = State.STOPPED
        self._inference.close()
        self._robot.close()

    def run(self, instruction: str, seconds: float) -> dict[str, Any]:
        """Control for so long, or until the robot says that its task is over. Ends with the hold command.

        Returns:
            The record: success, commands and ticks skipped, deadlines missed, each command's lateness and each decoding
            in milliseconds, interventions by reason, actions that came after their tick, errors of the policy, and the
            mean absolute third difference of the commands ("jerk").
        """
        self.instruction, self.state = instruction, State.RUNNING
        first = self._first_reading()
        buffer = ChunkBuffer(self._config.seam, self._robot.spec.gripper_index)
        before = self.safety.interventions.copy()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection takes longer than the jitter that a robot should see
        # Half a period after the robot's own ticks: neither early nor late commands fall into another of its periods.
        elapsed = math.ceil((time.monotonic() - first.time) * self._hz)
        run = _Run(Rate(self._hz, start=first.time + (elapsed + 0.5) / self._hz), buffer)
        try:
            while run.rate.tick < seconds * self._hz:
                run.rate.wait()
                reading = self._robot.observe() or first
                if reading.over:
                    run.success = reading.success
                    break
                self._think(run, reading)
                action = buffer.at(run.rate.tick)
                age = time.monotonic() - reading.time
                command = self.safety.check(action, age, run.entropy, "underrun" if run.begun else "no chunk yet")
                self._robot.command(command)
                run.rate.sent()
                run.commands.append(command)
        finally:
            gc.enable()
            gc.unfreeze()
            self.state = State.HOLDING
            self._robot.command(self._robot.spec.hold_action(run.commands[-1] if run.commands else None))
            self._drain()
        return run.report() | {"interventions": dict(self.safety.interventions - before)}

    def _think(self, run: _Run, reading: Reading) -> None:
        """Take the chunk that is ready, and ask for the next one when it is time."""
        tick = run.rate.tick
        answer = self._inference.take()
        if answer is not None:
            self._accept(run, answer)
        latency = self._inference.latency() + self._config.extra_latency_s
        needed = math.floor(latency * self._hz) + 1  # ticks until an answer can be used
        due = run.asked is None or tick - run.asked >= self._policy.n_action_steps
        if self._inference.busy_since is None and (due or run.buffer.ahead(tick) <= needed):
            if run.chunk is not None:
                run.memory.advance(tick - run.advanced)
            run.advanced = run.asked = tick
            committing = self._config.seam == "committed" and run.memory.draft is not None
            run.memory.committed = min(needed, run.buffer.ahead(tick), self._policy.horizon - 1) if committing else 0
            self._inference.request(tick, reading.observation, self.instruction, run.memory)

    def _accept(self, run: _Run, answer: Answer) -> None:
        if answer.prediction is None:
            run.errors.append(answer.error or "")
            return
        run.decode_ms.append(1e3 * answer.seconds)
        run.chunk = answer.prediction.chunks[0]
        run.entropy = float(answer.prediction.entropy.mean())
        run.begun = True
        run.buffer.put(run.chunk, answer.tick, run.rate.tick)

    def _first_reading(self) -> Reading:
        deadline = time.monotonic() + self._config.safety.max_age_s + 5.0
        while (reading := self._robot.observe()) is None:
            if time.monotonic() > deadline:
                raise SpecError("the robot gives no observation.")
            time.sleep(0.001)
        return reading

    def _drain(self) -> None:
        """Let a decoding that is still running end: its answer belongs to no run."""
        deadline = time.monotonic() + 5.0
        while self._inference.busy_since is not None and time.monotonic() < deadline:
            self._inference.take()
            time.sleep(0.001)


class _Run:
    """The moving parts and the record of one run."""

    def __init__(self, rate: Rate, buffer: ChunkBuffer) -> None:
        self.rate, self.buffer, self.memory = rate, buffer, Memory()
        self.chunk: np.ndarray | None = None
        self.entropy = 0.0
        self.begun = self.success = False  # begun: a first chunk has come
        self.asked: int | None = None  # tick of the last request
        self.advanced = 0  # tick that the memory stands at
        self.commands: list[np.ndarray] = []
        self.decode_ms: list[float] = []
        self.errors: list[str] = []

    def report(self) -> dict[str, Any]:
        jerk = np.abs(np.diff(np.stack(self.commands), n=3, axis=0)).mean() if len(self.commands) > 3 else 0.0
        return {
            "success": self.success,
            "commands": len(self.commands),
            "skipped": self.rate.skipped,
            "missed": self.rate.missed,
            "lateness_ms": [round(1e3 * late, 3) for late in self.rate.lateness],
            "decode_ms": [round(ms, 3) for ms in self.decode_ms],
            "late_actions": self.buffer.late,
            "errors": self.errors,
            "jerk": float(jerk),
        }
