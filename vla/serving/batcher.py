"""Batching of concurrent requests.

Owns: the request queue and the decoding thread. When the thread becomes idle, the queued requests form the next batch.
It does not know protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable

from vla.errors import ServerError
from vla.policy import Policy, Prediction
from vla.serving.requests import Request


@dataclasses.dataclass(frozen=True)
class Answer:
    """The prediction for one request (a batch of one), and the decoding time of its batch in seconds."""

    prediction: Prediction
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Job:
    request: Request
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Answer]


class Batcher:
    """Answers requests in the order of their arrival.

    Attributes:
        on_batch: called with the size of every batch.
    """

    def __init__(self, policy: Policy, max_batch: int, max_queue: int) -> None:
        self.policy, self._max_batch, self._max_queue = policy, max_batch, max_queue
        self.on_batch: Callable[[int], object] = lambda size: None
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._by_key: dict[str, Policy] = {}
        self._thread = threading.Thread(target=self._serve, daemon=True, name="vla-batcher")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return self._queue.qsize()

    async def answer(self, request: Request) -> Answer:
        """Queue a request and wait for its answer.

        Raises:
            ServerError: the queue is full.
            VLAError: the request is invalid.
            Exception: the policy failed.
        """
        if self.waiting >= self._max_queue:
            raise ServerError(f"the request queue is full ({self.waiting} waiting); try again later.")
        self._policy_for(request)  # reject an unknown key before the request is queued
        loop = asyncio.get_running_loop()
        job = _Job(request, loop, loop.create_future())
        self._queue.put(job)
        return await job.future

    def close(self) -> None:
        """Decode the queued requests, then stop the thread."""
        self._queue.put(None)
        self._thread.join(timeout=30)

    def _policy_for(self, request: Request) -> Policy:
        key = request.unnorm_key or self.policy.unnorm_key
        if key not in self._by_key:
            self._by_key[key] = self.policy.for_key(key)
        return self._by_key[key]

    def _serve(self) -> None:
        while True:
            jobs = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < self._max_batch:
                    jobs.append(self._queue.get_nowait())
            batches = defaultdict(list)
            for job in jobs:
                if job is not None and not job.future.cancelled():  # cancelled: the client has disconnected
                    batches[self._policy_for(job.request)].append(job)
            for policy, batch in batches.items():
                self._decode(policy, batch)
            if None in jobs:
                return

    def _decode(self, policy: Policy, jobs: list[_Job]) -> None:
        begun = time.perf_counter()
        requests = [job.request for job in jobs]
        try:
            prediction = policy.predict(
                [request.observation for request in requests],
                [request.instruction for request in requests],
                [request.draft for request in requests],
            )
        except Exception as error:
            if len(jobs) > 1:  # decode one by one, so that only the failing request gets the error
                for job in jobs:
                    self._decode(policy, [job])
                return
            for job in jobs:
                _settle(job, job.future.set_exception, error)
            return
        self.on_batch(len(jobs))
        seconds = time.perf_counter() - begun
        for row, job in enumerate(jobs):
            _settle(job, job.future.set_result, Answer(prediction.row(row), seconds))


def _settle(job: _Job, settle: Callable, value: object) -> None:
    def call() -> None:
        if not job.future.done():
            settle(value)

    with contextlib.suppress(RuntimeError):  # the event loop is closed
        job.loop.call_soon_threadsafe(call)
