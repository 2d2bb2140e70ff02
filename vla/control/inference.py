"""The policy in a thread of its own.

Owns: at most one decoding at a time beside the control loop, its actions as they become known, its result or its error,
and how long that takes. The loop asks and looks, and never waits.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import traceback

import numpy as np

from vla.policy import ChunkPolicy, Prediction
from vla.policy.session import Memory
from vla.spec import Observation

_REMEMBERED = 100  # decodings: one that hung is forgotten after so many


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of the request for the observation of `tick`: a chunk's first actions [n, D] while the others are
    decoded, then all of them and the prediction that they are of, or an error instead.

    Attributes:
        first_s, seconds: until the first action, and until what there is now.
    """

    tick: int
    first_s: float
    seconds: float
    actions: np.ndarray | None = None
    prediction: Prediction | None = None
    error: str | None = None

    @property
    def more(self) -> bool:
        """Whether the rest is still to come."""
        return self.prediction is None and self.error is None


class Inference:
    """Decodes in the background.

    Args:
        whole: chunks are handed over only when they are complete; otherwise a policy that `streams` hands over action
            after action.
        injected_latency_s: what is added to every decoding, of a chunk as a whole: so does a network.
    Attributes:
        busy_since: when the running request was made; None when there is none.
    """

    def __init__(self, policy: ChunkPolicy, whole: bool = False, injected_latency_s: float = 0.0) -> None:
        self._policy, self._injected = policy, injected_latency_s
        self._streams = policy.streams and not whole and not injected_latency_s
        self._wake = threading.Condition()
        self._request: tuple[int, Observation, str, Memory] | None = None
        self._answer: Answer | None = None
        self._closed = False
        self.busy_since: float | None = None
        self.latency = 0.0  # 99 of 100 of the last decodings had their first action in so many seconds
        self._first_s: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-inference")
        self._thread.start()

    def request(self, tick: int, observation: Observation, instruction: str, memory: Memory) -> None:
        """Start to decode; only when nothing is running. `memory` is the thread's until all of the answer is taken."""
        with self._wake:
            assert self.busy_since is None, "one request at a time"
            self._request, self.busy_since = (tick, observation, instruction, memory), time.monotonic()
            self._wake.notify()

    def take(self) -> Answer | None:
        """What there is of the answer; None when that has been taken already."""
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
                (tick, observation, instruction, memory), self._request = self._request, None
            self._decode(tick, observation, instruction, memory)

    def _decode(self, tick: int, observation: Observation, instruction: str, memory: Memory) -> None:
        request, start = ([observation], [instruction], [memory]), time.monotonic()
        known: list[np.ndarray] = []
        first_s = 0.0

        def hand_over(index: int, action: np.ndarray) -> None:
            nonlocal first_s
            known.append(action)
            seconds = time.monotonic() - start
            first_s = first_s or seconds
            self._put(Answer(tick, first_s, seconds, np.stack(known)))

        actions, prediction, error = None, None, None
        try:
            prediction = self._policy.predict(*request, hand_over) if self._streams else self._policy.predict(*request)
            actions = prediction.chunks[0]
        except Exception as problem:  # whatever it is, the robot must go on being commanded
            error = "".join(traceback.format_exception_only(problem)).strip()
        if self._injected:
            time.sleep(self._injected)
        seconds = time.monotonic() - start
        if known or error is None:  # an error says nothing about how long an action takes
            self._first_s.append(first_s or seconds)
            self.latency = float(np.quantile(self._first_s, 0.99))
        self._put(Answer(tick, first_s or seconds, seconds, actions, prediction, error))

    def _put(self, answer: Answer) -> None:
        with self._wake:
            self._answer = answer
