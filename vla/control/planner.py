"""Planning of chunks: when to request one, and the control step of each of its actions.

Owns: the latest request, the draft for the next request, and the received chunks. It does not know safety limits or the
timing of the loop.

If a chunk is requested with the observation of step k, its action i is for step k + i. Actions are executed while the
rest of the chunk is being decoded. If `ControlConfig.transition` is "prefix", the actions that are executed before the
first new action arrives are passed to the decoder as the chunk's first tokens (prefix conditioning,
`vla.decoding.prefix`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import numpy as np

from vla.config import ControlConfig
from vla.control.buffer import ChunkBuffer
from vla.control.clock import Rate
from vla.control.inference import Answer, Inference
from vla.control.record import RunRecord
from vla.control.robot import Reading
from vla.policy import ChunkPolicy
from vla.policy.session import Session

_HISTORY = 1000  # number of commands kept


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for a chunk.

    Attributes:
        step: control step of its observation.
        taken: time of its observation, in seconds of `time.monotonic`.
        heard: time at which actions last arrived; equal to `taken` before the first arrival.
        delay: the chunk's first action is for step `step + delay`.
        stalled: whether no action arrived for longer than `max_age_s`; `delay` then no longer changes.
        failed: whether decoding ended with an error.
    """

    step: int
    taken: float
    heard: float
    delay: int = 0
    stalled: bool = False
    failed: bool = False


def place_chunk(request: Request, heard: float, waited: int, max_age_s: float) -> Request:
    """Update a request whose actions arrived at time `heard`: choose the control step of its first action.

    | while the chunk was decoded, the robot    | step of the chunk's first action                              |
    |-------------------------------------------|---------------------------------------------------------------|
    | executed earlier actions                  | the observation's step; late actions are dropped              |
    | held for `waited` steps without an action | the observation's step + `waited`: the robot has not moved    |
    | got no actions for over `max_age_s`       | not delayed further, because the scene may have changed       |
    """
    stalled = request.stalled or heard - request.heard > max_age_s
    delay = request.delay if stalled else waited
    return dataclasses.replace(request, heard=heard, delay=delay, stalled=stalled)


class Planner:
    """The chunks of one run.

    Attributes:
        begun: whether a chunk has arrived since the start or the last `reset`.
        entropy: mean entropy of the tokens of the last complete chunk, in nats.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        inference: Inference,
        rate: Rate,
        config: ControlConfig,
        buffer: ChunkBuffer,
        record: RunRecord,
    ) -> None:
        self._policy, self._inference, self._rate = policy, inference, rate
        self._config, self._buffer, self._record = config, buffer, record
        self._session = Session()  # the instruction of the last request, and a draft that begins at its step
        self._request: Request | None = None
        self._executed: int | None = None  # how many actions of the requested chunk to execute; None until they arrive
        self._commands: collections.deque[tuple[int, np.ndarray]] = collections.deque(maxlen=_HISTORY)
        self._idle: collections.deque[int] = collections.deque(maxlen=_HISTORY)  # steps that had no action
        self.begun, self.entropy = False, 0.0

    def due(self, step: int, instruction: str) -> bool:
        """Whether to request a chunk to be executed from `step` on. True if `n_action_steps` steps have passed since
        the last request, if the buffer would run out before the answer, if the last request failed, or if the
        instruction has changed.

        If decoding takes longer than executing half a chunk, the request waits until the buffer has no action after
        `step`, because the robot's state would be outdated when the chunk arrives. With a delay of 6 steps, 39 of 40
        episodes succeed if the buffer is empty at the request, and 34 if it has two or four actions (docs/log.md).
        """
        request = self._request
        if request is None or request.failed or self._session.instruction != instruction:
            return True
        near = self._near
        pace = near and step - request.step >= self._policy.n_action_steps
        return pace or self._buffer.ahead(step) <= (self._steps_to_answer if near else 1)

    def is_new(self, reading: Reading, instruction: str) -> bool:
        """Whether a request with this observation and instruction would differ from the last one."""
        request = self._request
        if request is None or request.failed:
            return True
        return reading.time > request.taken or self._session.instruction != instruction

    @property
    def idle(self) -> bool:
        """Whether no chunk is being decoded."""
        return self._inference.busy_since is None

    def request(self, reading: Reading, instruction: str, step: int) -> None:
        """Request a chunk for `reading`, to be executed from control step `step` on."""
        if self._session.instruction != instruction:
            self._session = Session(instruction)  # the draft is for the previous task
            self._buffer.new_task()
        now, last = self._rate.clock.monotonic(), self._request
        due = max(now, self._rate.deadline(step))
        observed = max(step - math.floor((due - reading.time) * self._rate.hz), last.step if last else 0)
        if last is not None:
            waited = last.delay if last.stalled else self._waited(last.step, observed)
            self._session.advance(observed - last.step - waited)
        self._request = Request(observed, reading.time, reading.time)
        self._executed = None
        draft = self._session.draft
        if self._config.transition == "prefix" and len(draft):
            passing = max(0.0, now + self._inference.latency - self._rate.deadline(step))
            end = step + math.ceil(passing * self._rate.hz)
            prefix = self._expected(observed, min(end - observed, len(draft) - 1), step)
            draft = draft.given(prefix, self._config.prefix_threshold) if len(prefix) else draft
        self._inference.request(observed, reading.observation, instruction, draft)

    def receive(self, step: int) -> dict[str, Any] | None:
        """Receive the actions decoded since the last call; `step` is the next control step.

        Returns:
            `StepEvent.decoding` if a decoding has ended, else None.
        """
        answer = self._inference.take()
        if answer is None:
            return None
        event = {"asked": answer.tick, "ms": round(1e3 * answer.seconds, 3)}
        if answer.error is not None:
            self._buffer.complete()
            if self._request is not None:
                self._request = dataclasses.replace(self._request, failed=True)
            self._record.failed(answer.error)
            return event | {"error": answer.error}
        if answer.prediction is not None:
            self._record.decoded(answer.seconds, answer.first_s)
            self.entropy = float(answer.prediction.entropy.mean())
        if self._request is not None and self._request.step == answer.tick:  # otherwise, `reset` has dropped it
            self._accept(answer, self._request, step)
        if answer.prediction is None:
            return None
        return event | {"entropy": self.entropy, "ids": answer.prediction.ids[0].tolist()}

    def _accept(self, answer: Answer, request: Request, step: int) -> None:
        assert answer.actions is not None
        waited = self._waited(request.step, step)
        request = place_chunk(request, self._rate.clock.monotonic(), waited, self._config.safety.max_age_s)
        first, self.begun = request.step + request.delay, True
        if self._executed is None:
            self._executed = step - first + (self._policy.horizon if self._near else self._policy.n_action_steps)
        if answer.prediction is not None:
            self._session.draft = answer.prediction.next_draft[0]
        self._request = request
        self._buffer.put(answer.actions[: self._executed], first, step, answer.more)

    def action(self, step: int) -> np.ndarray | None:
        """The action for `step`, float32 [D]; None if none is available."""
        return self._buffer.at(step)

    def sent(self, step: int, command: np.ndarray, idle: bool) -> None:
        """Record that `command` was sent in `step`. `idle`: no action was available for the step."""
        self._commands.append((step, command))
        if idle:
            self._idle.append(step)

    def reset(self) -> None:
        """Drop all chunks and the open request, to plan from scratch after a hold."""
        self._buffer.clear()
        self._session = Session(self._session.instruction)
        self._request, self.begun = None, False

    @property
    def _steps_to_answer(self) -> int:
        """Number of control steps until the answer to a request arrives, at the 99th percentile of latency."""
        return math.floor(self._inference.latency * self._rate.hz) + 1

    @property
    def _near(self) -> bool:
        """Whether answers arrive within half a chunk."""
        return self._steps_to_answer <= self._policy.horizon // 2

    def _waited(self, first: int, end: int) -> int:
        """Number of steps without an action, from `first` up to and excluding `end`."""
        return sum(first <= step < end for step in self._idle)

    def _expected(self, first: int, count: int, now: int) -> np.ndarray:
        """The actions of `count` steps from step `first` on, if no other chunk arrives: past commands, then buffered
        actions. [n, D] with n <= count; `now` is the next step."""
        past = [command for step, command in self._commands if step >= first and step not in self._idle]
        ahead = [self._buffer.at(step) for step in range(now, first + count)]
        return np.array(past + [action for action in ahead if action is not None], np.float32)[:count]
