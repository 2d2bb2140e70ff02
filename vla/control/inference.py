"""Inference in a background thread.

Owns: the thread that decodes one chunk at a time, its latest actions or error, and its latency. The control loop
requests and polls; it never waits.
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

_WINDOW = 100  # number of decodings over which latency is measured


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to the request with the observation of control step `tick`.

    Attributes:
        first_s, seconds: time from the request to the first action, and to this answer.
        actions: float32 [n, D], the actions decoded so far; None after an error.
        prediction: the prediction, once the chunk is complete.
        error: why decoding failed; None without an error.
    """

    tick: int
    first_s: float
    seconds: float
    actions: np.ndarray | None = None
    prediction: Prediction | None = None
    error: str | None = None

    @property
    def more(self) -> bool:
        """Whether the rest of the chunk is still being decoded."""
        return self.prediction is None and self.error is None


class Inference:
    """Decodes in the background.

    Args:
        whole: pass on complete chunks only. Otherwise, actions are passed on one by one if the policy `streams`.
        injected_latency_s: latency added to every decoding, to simulate a network. If it is not 0, chunks are passed on
            as a whole.
        clock: clock of `busy_since` and of all latencies.
    Attributes:
        busy_since: time of the running request; None if none is running.
        latency: 99th percentile of the time to the first action over the last decodings, in seconds.
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
        self.latency = 0.0
        self._first_s: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-inference")
        self._thread.start()

    def request(self, tick: int, observation: Observation, instruction: str, draft: Draft | None) -> None:
        """Start decoding a chunk. No other decoding may be in progress."""
        with self._wake:
            assert self.busy_since is None, "one request at a time"
            self._request, self.busy_since = (tick, observation, instruction, draft), self._clock.monotonic()
            self._wake.notify()

    def take(self) -> Answer | None:
        """The newest answer; None if there is no new answer."""
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
        except Exception as problem:  # an error must not stop the control loop
            error = "".join(traceback.format_exception_only(problem)).strip()
        if self._injected:
            self._clock.sleep(self._injected)
        seconds = self._clock.monotonic() - start
        if known or error is None:  # failed decodings do not count
            self._first_s.append(first_s or seconds)
            self.latency = float(np.quantile(self._first_s, 0.99))
        self._put(Answer(tick, first_s or seconds, seconds, actions, prediction, error))

    def _put(self, answer: Answer) -> None:
        with self._wake:
            self._answer = answer
