"""The control loop.

Owns: the order of a control step (observe, request, choose, check, command) and the states of a run. `clock` keeps the
deadlines, `planner` manages the chunks, `inference` decodes them, and `safety` applies the limits. A step never waits
for a chunk, and always sends a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from vla.config import ControlConfig, check
from vla.control.buffer import ChunkBuffer
from vla.control.clock import Clock, Rate
from vla.control.events import StepEvent
from vla.control.inference import Inference
from vla.control.observation_monitor import ObservationMonitor, state_of
from vla.control.planner import Planner
from vla.control.record import RunRecord
from vla.control.robot import Reading, Robot
from vla.control.safety import SafetyFilter
from vla.errors import ConfigError, SpecError
from vla.policy import ChunkPolicy

# When a command is sent, as a fraction of the control period after its observation. A large value gives the policy more
# time to decode; the rest of the period is the margin for late commands.
_PHASE = 0.8
_EARLY = 0.1  # an observation may be this fraction of a period early
_POLL_S = 0.001  # polling interval while waiting for an observation or a decoding


class State(enum.Enum):
    """unconfigured -> ready -> running <-> holding -> stopped."""

    UNCONFIGURED = "unconfigured"
    READY = "ready"
    RUNNING = "running"
    HOLDING = "holding"
    STOPPED = "stopped"


@dataclasses.dataclass
class _Run:
    rate: Rate
    planner: Planner
    monitor: ObservationMonitor
    record: RunRecord
    decoding: dict[str, Any] | None = None  # `StepEvent.decoding` of the next step, if a decoding has already ended


class Controller:
    """Drives `robot` with `policy`. Use it as a context manager.

    `run` can be called repeatedly, always from the same thread. Other methods can be called from any thread.

    Args:
        clock: clock of the loop and of the robot's readings.
    Attributes:
        state: see `State`.
        safety: the safety filter, with its interventions and the emergency stop.
        instruction: the task of the policy; it may be changed during a run.
        listeners: called with every `StepEvent` in the control loop; they must return immediately.
    """

    def __init__(self, robot: Robot, policy: ChunkPolicy, config: ControlConfig, clock: Clock = time) -> None:
        check(config)
        ours, theirs = policy.robot, robot.spec
        self.hz = theirs.control_hz if config.hz is None else config.hz
        # Only a rate from the configuration may differ from the policy's.
        ours.check_fits(dataclasses.replace(theirs, control_hz=self.hz), tolerated=("rate",) if config.hz else ())
        self._robot, self._policy, self._config, self._clock = robot, policy, config, clock
        self.safety = SafetyFilter(theirs, config.safety, *policy.action_limits, hz=self.hz)
        _check_first_hold(robot)
        # Only the policy's cameras are monitored.
        self._monitored = dataclasses.replace(theirs, cameras=ours.cameras)
        self.state, self.instruction = State.UNCONFIGURED, ""
        self.listeners: list[Callable[[StepEvent], None]] = []
        whole = config.safety.max_entropy is not None  # the entropy is known when the chunk is complete
        self._inference = Inference(policy, whole, config.injected_latency_s, clock)
        self._on_hold = self._stopping = False

    def __enter__(self) -> Controller:
        try:
            self.configure()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def configure(self) -> None:
        """Decode one chunk as a warm-up, so that the first chunk of a run is not slower than later ones."""
        self._policy.warm_up()
        self.state = State.READY

    def close(self) -> None:
        self.state = State.STOPPED
        self._inference.close()
        self._robot.close()

    def hold(self) -> None:
        """Hold until `resume`; the run continues."""
        self._on_hold = True

    def resume(self) -> None:
        self._on_hold = False

    def stop(self) -> None:
        """End the current run at its next control step; if none is running, end the next run."""
        self._stopping = True

    def run(self, instruction: str, seconds: float) -> dict[str, Any]:
        """Control the robot for `seconds`, until it reports that its task has ended, or until `stop`. Ends with a hold.

        Returns:
            A dict with
            success: whether the robot reported success.
            commands, skipped, missed: number of commands, of skipped steps and of missed deadlines.
            lateness_ms: lateness of each command.
            first_action_ms, decode_ms: time to the first action and to the whole chunk, for each decoding.
            late_actions: number of actions that arrived after their step.
            interventions: number of interventions by reason.
            errors: errors of the policy.
            jerk: mean absolute third difference of the commands.
        """
        self.instruction = instruction
        with _no_garbage_collection():
            try:
                first = self._first_reading()
                return self._control(first, seconds)
            finally:
                self._stopping = False

    def _control(self, first: Reading, seconds: float) -> dict[str, Any]:
        reference = getattr(self._robot, "hold_reference", lambda: None)()  # optional in drivers
        self.safety.begin(state_of(first, self._robot.spec), reference)
        before = self.safety.interventions.copy()
        elapsed = math.ceil((self._clock.monotonic() - first.time) * self.hz)
        rate = Rate(self.hz, start=first.time + (elapsed + _PHASE) / self.hz, clock=self._clock)
        record, buffer = RunRecord(rate), ChunkBuffer(self._config.transition, self._robot.spec.gripper_index)
        planner = Planner(self._policy, self._inference, rate, self._config, buffer, record)
        run = _Run(rate, planner, ObservationMonitor(self._monitored, self._config.safety), record)
        try:
            while rate.tick < seconds * self.hz and not self._stopping:
                self._wait(run)
                reading = self._robot.observe() or first
                if reading.over:
                    record.success = reading.success
                    break
                self._step(run, reading)
        except BaseException:
            try:
                self._end()
            except Exception as problem:  # a warning only, because the original error is raised
                warnings.warn(f"the hold command could not be sent: {problem}", stacklevel=2)
            raise
        self._end()
        return record.report(buffer.late) | {"interventions": dict(self.safety.interventions - before)}

    def _end(self) -> None:
        """Hold, and wait for a running decoding, so that the next run does not receive its answer."""
        self.state = State.HOLDING
        try:
            self._robot.command(self.safety.hold().action)
        finally:
            deadline = self._clock.monotonic() + 5.0
            while self._inference.busy_since is not None and self._clock.monotonic() < deadline:
                self._inference.take()
                self._clock.sleep(_POLL_S)

    def _wait(self, run: _Run) -> None:
        """Sleep until the next control step. If a chunk is due, request it as soon as the step's observation has
        arrived and the previous decoding has ended, so that it is answered early. Observations from before the last
        command belong to the previous step and are not used."""
        step = run.rate.tick + 1
        begins = run.rate.deadline(step) - (_PHASE + _EARLY) / self.hz
        while run.rate.remaining() > _POLL_S and not self._held and run.planner.due(step, self.instruction):
            if not run.planner.idle:
                run.decoding = run.decoding or run.planner.receive(step)  # at most one per StepEvent
                self._clock.sleep(_POLL_S)
                continue  # with the received actions, the request may no longer be due
            reading = self._robot.observe()
            early = reading is None or reading.time < begins or not run.planner.is_new(reading, self.instruction)
            if reading is None or early or run.monitor.fault(reading, self._clock.monotonic()) is not None:
                self._clock.sleep(_POLL_S)
            elif reading.over:
                break
            else:
                run.planner.request(reading, self.instruction, step)
        run.rate.wait()

    def _step(self, run: _Run, reading: Reading) -> None:
        """Observe, request, choose, check, command."""
        step, planner, held = run.rate.tick, run.planner, self._held
        self.state = State.HOLDING if held else State.RUNNING
        fault = run.monitor.fault(reading, self._clock.monotonic())
        decoding, run.decoding = run.decoding or planner.receive(step), None
        usable = fault is None and planner.is_new(reading, self.instruction)
        if held:
            planner.reset()
        elif usable and planner.idle and planner.due(step, self.instruction):
            planner.request(reading, self.instruction, step)
        missing = "on hold" if held else "underrun" if planner.begun else "no chunk yet"
        state = reading.observation.get("agent_pos")
        action = planner.action(step)
        command = self.safety.check(action, fault, state, planner.entropy, missing)
        self._robot.command(command.action)
        run.rate.sent()
        planner.sent(step, command.action, idle=action is None)
        run.record.sent(command.action)
        if step % max(1, round(self.hz)) == 0:
            gc.collect(1)  # takes microseconds, because older objects are frozen
        event = StepEvent(step, run.rate.lateness[-1], reading, command.action, command.reasons, decoding)
        for listener in self.listeners:
            listener(event)

    @property
    def _held(self) -> bool:
        """Whether the operator holds the robot, or the emergency stop is pressed."""
        return self._on_hold or self.safety.stopped

    def _first_reading(self) -> Reading:
        """Wait for the first reading. For position commands, its state must be finite, to hold the robot there."""
        spec, deadline = self._robot.spec, self._clock.monotonic() + self._config.safety.max_age_s + 5.0
        while True:
            reading = self._robot.observe()
            any_state = spec.action_space.relative or not spec.state_dim
            if reading is not None and (any_state or state_of(reading, spec) is not None):
                return reading
            if self._clock.monotonic() > deadline or self._stopping:
                what = "an observation" if reading is None else f"a state of {spec.state_dim} finite numbers"
                raise SpecError(f"the robot has not sent {what}. Check the `observe` method of its driver.")
            self._clock.sleep(_POLL_S)


def _check_first_hold(robot: Robot) -> None:
    """Raise ConfigError if the position at which the robot holds before its first command is unknown: it would move to
    0. The gripper is exempt, because it opens."""
    spec, own = robot.spec, getattr(robot, "hold_reference", None)
    has_reference = own is not None and getattr(own, "__func__", own) is not Robot.hold_reference
    if has_reference or spec.action_space.relative:
        return
    gripper = None if spec.gripper_index is None else spec.action_names[spec.gripper_index]
    hold = spec.hold or (None,) * spec.action_dim
    repeated = [name for name, value in zip(spec.action_names, hold, strict=True) if value is None]
    if missing := [name for name in repeated if name not in spec.state_names and name != gripper]:
        states = ", ".join(spec.state_names) or "there is no state"
        raise ConfigError(
            f"the position at which the robot holds before its first command is unknown for {', '.join(missing)}: no "
            f"state entry has this name ({states}). Give the robot a method `hold_reference` that returns its position "
            "in the units of its commands, give actions and state entries the same names, or set these entries in the "
            "hold command; for an environment, in adapter.robot."
        )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable automatic garbage collection, because a full collection can delay a command. `_step` runs short ones."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
