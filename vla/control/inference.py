"""The policy in a thread of its own.

Owns: one decoding at a time beside the control loop: its actions as they are decoded, its result or error, and its
latency. The loop requests and polls; it never waits.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import traceback

import numpy as np

from vla.control.clock import Clock
from vla.policy import ChunkPolicy, Prediction
from vla.policy.session import Draft
from vla.spec import Observation

_WINDOW = 100  # decodings that the latency is measured over


@dataclasses.dataclass(frozen=True)
class Answer:
    """Result of the request for the observation of `tick`: a chunk's first actions [n, D] while the rest is decoded,
    then all actions and their prediction, or an error instead.

    Attributes:
        first_s, seconds: until the first action, and until this answer.
    """

    tick: int
    first_s: float
    seconds: float
    actions: np.ndarray | None = None
    prediction: Prediction | None = None
    error: str | None = None

    @property
    def more(self) -> bool:
        """Whether the rest is still being decoded."""
        return self.prediction is None and self.error is None


class Inference:
    """Decodes in the background.

    Args:
        whole: pass on complete chunks only; otherwise a policy that `streams` passes on action after action.
        injected_latency_s: added to every decoding, for a chunk as a whole, as a network would.
        clock: time, in `busy_since`, latencies and the injected latency.
    Attributes:
        busy_since: time of the running request; None when there is none.
    """

    def __init__(
        self, policy: ChunkPolicy, whole: bool = False, injected_latency_s: float = 0.0, clock: Clock = time
    ) -> None:
        self._policy, self._injected, self._clock = policy, injected_latency_s, clock
        self._streams = policy.streams and not whole and not injected_latency_s
        self._wake = threading.Condition()
        self._request: tuple[int, Observation, str, Draft | None] | None = None
        self._answer: Answer | None = None
        self._closed = False
        self.busy_since: float | None = None
        self.latency = 0.0  # p99 time to first action over the last decodings, in seconds
        self._first_s: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-inference")
        self._thread.start()

    def request(self, tick: int, observation: Observation, instruction: str, draft: Draft | None) -> None:
        """Start a decoding; only when none is running."""
        with self._wake:
            assert self.busy_since is None, "one request at a time"
            self._request, self.busy_since = (tick, observation, instruction, draft), self._clock.monotonic()
            self._wake.notify()

    def take(self) -> Answer | None:
        """The newest answer; None when there is no new one."""
        with self._wake:
            answer, self._answer = self._answer, None
            if answer is not None and not answer.more:
                self.busy_since = None
            return answer

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout=2)

    def _serve(self) -> None:
        while True:
            with self._wake:
                while self._request is None and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                assert self._request is not None
                (tick, observation, instruction, draft), self._request = self._request, None
            self._decode(tick, observation, instruction, draft)

    def _decode(self, tick: int, observation: Observation, instruction: str, draft: Draft | None) -> None:
        request, start = ([observation], [instruction], [draft]), self._clock.monotonic()
        known: list[np.ndarray] = []
        first_s = 0.0

        def hand_over(index: int, action: np.ndarray) -> None:
            nonlocal first_s
            known.append(action)
            seconds = self._clock.monotonic() - start
            first_s = first_s or seconds
            self._put(Answer(tick, first_s, seconds, np.stack(known)))

        actions, prediction, error = None, None, None
        try:
            prediction = self._policy.predict(*request, hand_over) if self._streams else self._policy.predict(*request)
            actions = prediction.chunks[0]
        except Exception as problem:  # any error: the control loop must continue
            error = "".join(traceback.format_exception_only(problem)).strip()
        if self._injected:
            self._clock.sleep(self._injected)
        seconds = self._clock.monotonic() - start
        if known or error is None:  # a failure is not a latency
            self._first_s.append(first_s or seconds)
            self.latency = float(np.quantile(self._first_s, 0.99))
        self._put(Answer(tick, first_s or seconds, seconds, actions, prediction, error))

    def _put(self, answer: Answer) -> None:
        with self._wake:
            self._answer = answer
