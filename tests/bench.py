"""A simulated robot for tests of the controller, and the check of its commands."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from vla.control.robot import Reading

if TYPE_CHECKING:
    from vla.control.controller import Controller
    from vla.policy import Policy

HZ = 20.0


class Bench:
    """A robot with random images, which change at every period. `broken(observation, tick)` may change or drop them.
    Ticks count from the first observation, so that a controller that starts slowly does not miss the first ones."""

    def __init__(self, spec, make) -> None:
        self.spec, self._observations = spec, make(8)
        self.commands: list[tuple[float, np.ndarray]] = []
        self.broken = lambda observation, tick: observation
        self._start: float | None = None
        self._last: Reading | None = None

    def observe(self) -> Reading:
        self._start = self._start or time.monotonic()
        tick = int((time.monotonic() - self._start) * HZ)
        observation = self.broken(self._observations[tick % 8], tick)
        if observation is not None or self._last is None:
            self._last = Reading(observation or self._observations[0], self._start + tick / HZ)
        return self._last

    def command(self, action: np.ndarray) -> None:
        self.commands.append((time.monotonic(), action))

    def close(self) -> None:
        pass


def at(controller: Controller, tick: int, do) -> None:
    """Call `do` once, at the control step `tick` or, if that was skipped, at the next one."""
    waiting = [do]

    def listen(event) -> None:
        if event.tick >= tick and waiting:
            waiting.pop()()

    controller.listeners.append(listen)


@pytest.fixture
def safe_and_on_time(record_property):
    """`safe_and_on_time(bench, policy, record, seconds)`: every command is finite and in range, and none is missing."""

    def check(bench: Bench, policy: Policy, record: dict, seconds: float) -> None:
        for name in ("commands", "missed", "lateness_ms"):  # for scripts/bench_faults
            record_property(name, record[name])
        actions = np.stack([action for _, action in bench.commands])
        low, high = policy.action_limits
        hold = bench.spec.hold_action(None)
        assert np.isfinite(actions).all()
        assert ((actions >= np.minimum(low, hold)) & (actions <= np.maximum(high, hold))).all()
        # A busy machine may be late occasionally; the fault must not cause delays.
        assert record["commands"] >= 0.9 * seconds * HZ and record["missed"] <= 0.1 * seconds * HZ

    return check
