"""The control loop.

Owns: the order of things in a tick (look, ask, choose, check, command), when a new chunk is asked for, and the record
of a run. Deadlines are `clock`'s, thinking is `inference`'s, limits are `safety`'s: each tick takes what is there at
that moment and always sends a command.

Actions carry the tick they are for. A chunk for the observation of tick k speaks about ticks k, k + 1, ... It is asked
for as soon as that observation is there, which is before the tick, and an autoregressive policy decodes its actions in
the order in which they are needed: the first may be in time for tick k, and the others follow while it is executed. If
the first comes later, what the chunk says about the ticks in between is dropped. With the "committed"
transition those ticks' actions, which execute while it is decoded, are given to the decoder as the chunk's first tokens
(prefix conditioning): the policy continues them, at no cost, while it finds them plausible (`vla.decoding.prefix`).
"""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import enum
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vla.config import ControlConfig, check
from vla.control.buffer import ChunkBuffer
from vla.control.clock import Rate
from vla.control.events import StepEvent
from vla.control.inference import Answer, Inference
from vla.control.observation_monitor import ObservationMonitor, state_of
from vla.control.robot import Reading, Robot
from vla.control.safety import SafetyFilter
from vla.errors import SpecError
from vla.policy import ChunkPolicy
from vla.policy.session import Session

_KEPT = 1000  # commands and errors that a run remembers
#: Where in the robot's period commands leave. Its pictures are taken at 0: later is more time to think about them. At 1
#: the next period begins, and a command that is late by more than what is left to it falls into another one.
_PHASE = 0.8
_EARLY = 0.1  # of a period: by so much a camera may be ahead of its time
_GLANCE_S = 0.001  # how often it looks whether a picture has come that it waits for


class State(enum.Enum):
    """unconfigured -> ready -> running <-> holding -> stopped."""

    UNCONFIGURED = "unconfigured"
    READY = "ready"
    RUNNING = "running"
    HOLDING = "holding"
    STOPPED = "stopped"


class Controller:
    """Drives `robot` with `policy`. Use it as a context manager; `run` may be called many times, from one thread; the
    other methods are for any thread.

    Attributes:
        state: see `State`.
        safety: its interventions, and the emergency stop.
        instruction: what the policy is told; may be changed while it runs.
        listeners: called with every `StepEvent`, in the loop: they must only hand it over.
    """

    def __init__(self, robot: Robot, policy: ChunkPolicy, config: ControlConfig) -> None:
        check(config)
        ours, theirs = policy.robot, robot.spec
        self.hz = theirs.control_hz if config.hz is None else config.hz
        # A rate that was asked for is meant.
        ours.check_fits(dataclasses.replace(theirs, control_hz=self.hz), tolerated=("rate",) if config.hz else ())
        self._robot, self._policy, self._config = robot, policy, config
        self.safety = SafetyFilter(theirs, config.safety, *policy.action_limits, hz=self.hz)
        # The cameras that the policy looks at; what others show is none of its business.
        self._seen = dataclasses.replace(theirs, cameras=ours.cameras)
        self.state, self.instruction = State.UNCONFIGURED, ""
        self.listeners: list[Callable[[StepEvent], None]] = []
        # Who judges a chunk as a whole must wait for it.
        whole = config.safety.max_entropy is not None
        self._inference = Inference(policy, whole, config.injected_latency_s)
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
        """Decode once, so that the first chunk of a run comes as fast as the others."""
        self._policy.warm_up()
        self.state = State.READY

    def close(self) -> None:
        self.state = State.STOPPED
        self._inference.close()
        self._robot.close()

    def hold(self) -> None:
        """The robot holds, and the run goes on, until `resume`."""
        self._on_hold = True

    def resume(self) -> None:
        self._on_hold = False

    def stop(self) -> None:
        """End the run that is going on, or the next one, at its next tick."""
        self._stopping = True

    def run(self, instruction: str, seconds: float) -> dict[str, Any]:
        """Control for so long, until the robot says that its task is over, or until `stop`. Ends with the hold command.

        Returns:
            The record: success, commands and ticks skipped, deadlines missed, in milliseconds each command's lateness,
            and for each decoding how long its first action and all of it took, interventions by reason, actions that
            came after their tick, errors of the policy, and the mean absolute third difference of the commands
            ("jerk").
        """
        self.instruction = instruction
        with _undisturbed():
            try:
                first = self._first_reading()
                return self._control(first, seconds)
            finally:
                self._stopping = False

    def _control(self, first: Reading, seconds: float) -> dict[str, Any]:
        reference = getattr(self._robot, "hold_reference", lambda: None)()  # drivers need not have it
        self.safety.begin(state_of(first, self._robot.spec), reference)
        before = self.safety.interventions.copy()
        elapsed = math.ceil((time.monotonic() - first.time) * self.hz)
        rate = Rate(self.hz, start=first.time + (elapsed + _PHASE) / self.hz)
        run = _Run(rate, ChunkBuffer(self._config.seam, self._robot.spec.gripper_index))
        monitor = ObservationMonitor(self._seen, self._config.safety)
        try:
            while run.rate.tick < seconds * self.hz and not self._stopping:
                self._wait(run, monitor)
                reading = self._robot.observe() or first
                if reading.over:
                    run.success = reading.success
                    break
                self._tick(run, reading, monitor)
        except BaseException:
            try:
                self._end()
            except Exception as problem:  # the first error is the one to tell; this one is told beside it
                warnings.warn(f"the robot could not be told to hold: {problem}", stacklevel=2)
            raise
        self._end()
        return run.report() | {"interventions": dict(self.safety.interventions - before)}

    def _end(self) -> None:
        """Hold, and let a decoding that is still running end: its answer belongs to no run."""
        self.state = State.HOLDING
        try:
            self._robot.command(self.safety.hold().action)
        finally:
            self._drain()

    def _wait(self, run: _Run, monitor: ObservationMonitor) -> None:
        """Sleep until the next tick. When it is time to ask for a chunk, ask as soon as this tick's picture comes (and
        the policy has answered what it was asked before): at the tick it would be older, and the answer a tick later.
        Pictures from before that show the world as the last command found it: what the policy says about them is for
        the last tick."""
        tick = run.rate.tick + 1
        begins = run.rate.deadline(tick) - (_PHASE + _EARLY) / self.hz
        while run.rate.left() > _GLANCE_S and not self._waits_for_somebody and self._due(run, tick):
            if self._inference.busy_since is not None:
                run.decoding = run.decoding or self._take(run, tick)  # one a tick: the black box hears of each
                time.sleep(_GLANCE_S)
                continue  # with what has been taken it may no longer be due
            reading = self._robot.observe()
            awaited = reading is None or reading.time < begins or not self._is_new(run, reading)
            if reading is None or awaited or monitor.fault(reading, time.monotonic()) is not None:
                time.sleep(_GLANCE_S)
            elif reading.over:
                break
            else:
                self._ask(run, reading, tick)
        run.rate.wait()

    def _tick(self, run: _Run, reading: Reading, monitor: ObservationMonitor) -> None:
        """Look, think, check, command: what is there at this moment is what counts."""
        on_hold = self._waits_for_somebody
        self.state = State.HOLDING if on_hold else State.RUNNING
        fault = monitor.fault(reading, time.monotonic())
        decoding, run.decoding = run.decoding or self._take(run, run.rate.tick), None
        free = self._inference.busy_since is None
        if on_hold:
            run.forget()
        elif fault is None and free and self._is_new(run, reading) and self._due(run, run.rate.tick):
            self._ask(run, reading, run.rate.tick)
        missing = "on hold" if on_hold else "underrun" if run.begun else "no chunk yet"
        state = reading.observation.get("agent_pos")
        wanted = run.buffer.at(run.rate.tick)
        command = self.safety.check(wanted, fault, state, run.entropy, missing)
        self._robot.command(command.action)
        run.rate.sent()
        run.note(command.action, empty=wanted is None)
        if run.rate.tick % max(1, round(self.hz)) == 0:
            gc.collect(1)  # what a second leaves behind is found in microseconds: the rest is frozen
        event = StepEvent(run.rate.tick, run.rate.lateness[-1], reading, command.action, command.reasons, decoding)
        for listener in self.listeners:
            listener(event)

    def _take(self, run: _Run, tick: int) -> dict[str, Any] | None:
        """Take what there is of a chunk, `tick` being the next to be commanded; returns what a black box wants to know
        about a decoding that has ended."""
        answer = self._inference.take()
        if answer is None:
            return None
        about = {"asked": answer.tick, "ms": round(1e3 * answer.seconds, 3)}
        if answer.error is not None:
            run.fail()
            if len(run.errors) < _KEPT:
                run.errors.append(answer.error)
            return about | {"error": answer.error}
        executed = self._policy.horizon if self._near else self._policy.n_action_steps
        run.accept(answer, tick, self._config.safety.max_age_s, executed)
        if answer.prediction is None:
            return None  # the rest is still to come
        return about | {"entropy": run.entropy, "ids": answer.prediction.ids[0].tolist()}

    def _due(self, run: _Run, tick: int) -> bool:
        """Whether it is time to ask for the next chunk, to be executed from `tick` on: at the policy's own pace, when
        the buffer runs out before then, or because the last request has failed.

        A policy that is far away is waited for instead: asked when the last of `n_action_steps` actions is about to be
        executed, it answers to where the robot is, not to where it was two plans ago."""
        if run.asked is None or run.asked_at == -math.inf or run.session.instruction != self.instruction:
            return True
        pace = self._near and tick - run.asked >= self._policy.n_action_steps
        return pace or run.buffer.ahead(tick) <= (self._needed if self._near else 1)

    def _is_new(self, run: _Run, reading: Reading) -> bool:
        """Whether a chunk for this picture can be another one than the last."""
        return reading.time > run.asked_at or run.session.instruction != self.instruction

    def _ask(self, run: _Run, reading: Reading, tick: int) -> None:
        """Ask for a chunk; `tick` is the next to be commanded."""
        instruction = self.instruction
        if run.session.instruction != instruction:
            run.session = Session(instruction)  # the old draft is for another task
            run.buffer.new_task()
        now = time.monotonic()
        due = max(now, run.rate.deadline(tick))
        # The tick that the picture is of: it may be an older one.
        seen = max(tick - math.floor((due - reading.time) * self.hz), run.asked or 0)
        if run.asked is not None:
            run.session.advance(seen - run.asked - (run.waited(run.asked, seen) if run.fresh else run.shift))
        run.ask(seen, reading.time)
        draft = run.session.draft
        if self._config.seam == "committed" and draft is not None:
            passing = max(0, math.ceil((now + self._inference.latency - run.rate.deadline(tick)) * self.hz))
            plan = run.plan(seen, min(tick + passing - seen, len(draft) - 1), tick)
            draft = draft.given(plan, self._config.trust) if len(plan) else draft
        self._inference.request(seen, reading.observation, instruction, draft)

    @property
    def _waits_for_somebody(self) -> bool:
        return self._on_hold or self.safety.stopped

    @property
    def _needed(self) -> int:
        """Ticks until an answer can be used, at most."""
        return math.floor(self._inference.latency * self.hz) + 1

    @property
    def _near(self) -> bool:
        """Whether at most half a chunk passes until an answer comes: the robot need not wait for it."""
        return self._needed <= self._policy.horizon // 2

    def _first_reading(self) -> Reading:
        """The first that says where the robot is, if its commands are positions: it is to stay there."""
        spec, deadline = self._robot.spec, time.monotonic() + self._config.safety.max_age_s + 5.0
        while True:
            reading = self._robot.observe()
            placed = spec.action_space.relative or not spec.state_dim
            if reading is not None and (placed or state_of(reading, spec) is not None):
                return reading
            if time.monotonic() > deadline or self._stopping:
                what = "observation" if reading is None else f"finite state of {spec.state_dim} entries"
                raise SpecError(f"the robot gives no {what}.")
            time.sleep(0.001)

    def _drain(self) -> None:
        deadline = time.monotonic() + 5.0
        while self._inference.busy_since is not None and time.monotonic() < deadline:
            self._inference.take()
            time.sleep(0.001)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collections: they take longer than the jitter that a robot should see. `_tick` does small ones."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class _Run:
    """The moving parts and the record of one run."""

    def __init__(self, rate: Rate, buffer: ChunkBuffer) -> None:
        self.rate, self.buffer = rate, buffer
        self.session = Session()  # its instruction is that of the last request
        self.asked: int | None = None  # tick of the last request's observation; the session's draft begins there
        self.asked_at = -math.inf  # when that was taken
        self.heard_at = -math.inf  # when something of the answer to it came; before, when the observation was taken
        self.fresh = True  # whether never more than `max_age_s` went by without anything
        self.shift = 0  # so many ticks later than for its observation's the answer's actions are executed
        self.decoding: dict[str, Any] | None = None  # what ended since the last tick
        self.end: int | None = None  # so many actions of the last chunk are executed; None: nothing of it has come
        self.entropy = 0.0
        self.begun = self.success = False  # begun: a first chunk has come
        self.commands: collections.deque[tuple[int, np.ndarray]] = collections.deque(maxlen=_KEPT)  # with their ticks
        self._empty: collections.deque[int] = collections.deque(maxlen=_KEPT)  # ticks for which there was no action
        self._jerk, self._jerks = 0.0, 0
        self.decode_ms, self.first_action_ms = array.array("d"), array.array("d")  # a run may last for days
        self.errors: list[str] = []

    def note(self, command: np.ndarray, empty: bool) -> None:
        """Another command has left; `empty` if there was no action for this tick."""
        self.commands.append((self.rate.tick, command))
        if empty:
            self._empty.append(self.rate.tick)
        if len(self.commands) > 3:
            a, b, c, d = (self.commands[i][1] for i in range(-4, 0))
            self._jerk += float(np.abs(d - 3 * c + 3 * b - a).mean())
            self._jerks += 1

    def ask(self, tick: int, taken: float) -> None:
        """The observation of `tick`, taken then, is asked about."""
        self.asked, self.asked_at, self.heard_at = tick, taken, taken
        self.end, self.fresh, self.shift = None, True, 0

    def accept(self, answer: Answer, now: int, max_age_s: float, executed: int) -> None:
        """Put what there is of an answer's chunk into the buffer, and no more than may be `executed` from when its
        first action came, `now` being the next tick to be commanded; a plan that was given up since is forgotten.

        A robot that waited for it stands where its picture shows it: the ticks that it held for want of an action move
        the chunk back. If it waited for more than `max_age_s`, for the first action or the next, the world may be
        another: what comes late then is late."""
        assert answer.actions is not None
        if answer.prediction is not None:
            self.decode_ms.append(1e3 * answer.seconds)
            self.first_action_ms.append(1e3 * answer.first_s)
            self.entropy = float(answer.prediction.mean_entropy.mean())
        if self.asked == answer.tick:
            heard_at, self.heard_at = self.heard_at, time.monotonic()
            self.begun, self.fresh = True, self.fresh and self.heard_at - heard_at <= max_age_s
            self.shift = self.waited(answer.tick, now) if self.fresh else self.shift
            first = answer.tick + self.shift
            self.end = now - first + executed if self.end is None else self.end
            if answer.prediction is not None:
                self.session.draft = answer.prediction.next_draft[0]
            self.buffer.put(answer.actions[: self.end], first, now, answer.more)

    def waited(self, first: int, end: int) -> int:
        """For how many ticks from `first` to before `end` there was no action."""
        return sum(first <= tick < end for tick in self._empty)

    def fail(self) -> None:
        """The last request brought nothing, or nothing more: its picture may be asked about again."""
        self.buffer.complete()
        self.asked_at = -math.inf

    def plan(self, first: int, count: int, now: int) -> np.ndarray:
        """The actions that are executed in `count` ticks from `first` on if nothing new comes, [at most count, D]: past
        commands, then what the buffer says; `now` is the next tick to be commanded."""
        past = [command for tick, command in self.commands if tick >= first and tick not in self._empty]
        ahead = [self.buffer.at(tick) for tick in range(now, first + count)]
        return np.array(past + [action for action in ahead if action is not None], np.float32)[:count]

    def forget(self) -> None:
        """Give up the plan: what comes after a hold begins anew."""
        self.buffer.clear()
        self.session = Session(self.session.instruction)
        self.asked, self.asked_at, self.begun = None, -math.inf, False

    def report(self) -> dict[str, Any]:
        return {
            "success": self.success,
            "commands": len(self.rate.lateness),
            "skipped": self.rate.skipped,
            "missed": self.rate.missed,
            "lateness_ms": [round(1e3 * late, 3) for late in self.rate.lateness],
            "first_action_ms": [round(ms, 3) for ms in self.first_action_ms],
            "decode_ms": [round(ms, 3) for ms in self.decode_ms],
            "late_actions": self.buffer.late,
            "errors": self.errors,
            "jerk": self._jerk / max(self._jerks, 1),
        }
