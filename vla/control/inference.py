"""The policy in a thread of its own.

Owns: at most one decoding at a time beside the control loop, its result or its error, and how long decodings take. The
loop asks and looks, and never waits.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import traceback

import numpy as np

from vla.memory import Memory
from vla.policy import ChunkPolicy, Prediction
from vla.spec import Observation


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request: a prediction for the observation of `tick`, or the error instead."""

    tick: int
    seconds: float
    prediction: Prediction | None
    error: str | None = None


class Inference:
    """Decodes in the background. `busy_since` is when the running request was made; None when there is none."""

    def __init__(self, policy: ChunkPolicy, injected_latency_s: float = 0.0) -> None:
        self._policy, self._injected = policy, injected_latency_s
        self._wake = threading.Condition()
        self._request: tuple[int, Observation, str, Memory] | None = None
        self._answer: Answer | None = None
        self._closed = False
        self.busy_since: float | None = None
        self.seconds: collections.deque[float] = collections.deque(maxlen=1000)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-inference")
        self._thread.start()

    def request(self, tick: int, observation: Observation, instruction: str, memory: Memory) -> None:
        """Start to decode; only when nothing is running. `memory` is the thread's until the answer is taken."""
        with self._wake:
            assert self.busy_since is None, "one request at a time"
            self._request, self.busy_since = (tick, observation, instruction, memory), time.monotonic()
            self._wake.notify()

    def take(self) -> Answer | None:
        """The answer, once; None while there is none."""
        with self._wake:
            answer, self._answer = self._answer, None
            if answer is not None:
                self.busy_since = None
            return answer

    def latency(self, share: float = 0.99) -> float:
        """Seconds in which this share of the last decodings was done; 0 before the first."""
        return float(np.quantile(self.seconds, share)) if self.seconds else 0.0

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
                (tick, observation, instruction, memory), self._request = self._request, None
            start = time.monotonic()
            try:
                prediction, error = self._policy.predict([observation], [instruction], [memory]), None
            except Exception as problem:  # whatever it is, the robot must go on being commanded
                prediction, error = None, "".join(traceback.format_exception_only(problem)).strip()
            if self._injected:
                time.sleep(self._injected)
            seconds = time.monotonic() - start
            with self._wake:
                self.seconds.append(seconds)
                self._answer = Answer(tick, seconds, prediction, error)
