"""Time that passes only while everybody who takes part sleeps.

What a controller does then depends on no machine's load: computing takes no time, and a sleep takes exactly its own.
"""

import heapq
import itertools
import threading

import pytest


class VirtualTime:
    """`monotonic` and `sleep` of `time`, for one thread and others from `busy` until `idle`."""

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
            # A wait that ends a rounding error early is repeated: it must not stand still.
            me = (self._now + max(seconds, 1e-9), next(self._numbers))
            heapq.heappush(self._asleep, me)
            self._rest()
            assert self._turn.wait_for(lambda: self._woken == me, timeout=60), "somebody takes part who never sleeps"
            self._woken = None

    def busy(self) -> None:
        """Another thread has begun something: time stands still until it sleeps or is idle."""
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
    """The clock of every controller, and the `time` of the test's own module."""
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
