"""A virtual clock that advances only while all participating threads sleep.

The behaviour of a controller then does not depend on the machine: computation takes no time, and a sleep takes exactly
its duration.
"""

import heapq
import itertools
import threading

import pytest


class VirtualTime:
    """Replaces `monotonic` and `sleep` of `time`, for the main thread and for threads between `busy` and `idle`."""

    def __init__(self) -> None:
        self._now, self._awake = 1000.0, 1
        self._numbers = itertools.count()
        self._asleep: list[tuple[float, int]] = []
        self._woken: tuple[float, int] | None = None
        self._turn = threading.Condition()

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._turn:
            # A sleep that ends too early by a rounding error is repeated, so it must advance the clock.
            me = (self._now + max(seconds, 1e-9), next(self._numbers))
            heapq.heappush(self._asleep, me)
            self._rest()
            assert self._turn.wait_for(lambda: self._woken == me, timeout=60), "a participating thread does not sleep"
            self._woken = None

    def busy(self) -> None:
        """Another thread starts to work: the clock stops until it sleeps or is idle."""
        with self._turn:
            self._awake += 1

    def idle(self) -> None:
        with self._turn:
            self._rest()

    def _rest(self) -> None:
        self._awake -= 1
        if not self._awake and self._asleep:
            self._woken = heapq.heappop(self._asleep)
            self._now, self._awake = self._woken[0], 1
            self._turn.notify_all()


@pytest.fixture
def virtual_time(request, monkeypatch) -> VirtualTime:
    """Replaces the clock of all controllers and the `time` of the test module."""
    from vla.control import inference
    from vla.control.controller import Controller

    virtual = VirtualTime()
    monkeypatch.setattr(Controller.__init__, "__defaults__", (virtual,))
    monkeypatch.setattr(request.module, "time", virtual)
    ask, put = inference.Inference.request, inference.Inference._put

    def begin(self, *question) -> None:
        virtual.busy()
        ask(self, *question)

    def end(self, answer) -> None:
        put(self, answer)
        if not answer.more:
            virtual.idle()

    monkeypatch.setattr(inference.Inference, "request", begin)
    monkeypatch.setattr(inference.Inference, "_put", end)
    return virtual
