"""The control rate, on a clock that the test turns."""

import pytest

from vla.control.clock import Rate


class Clock:
    """Time that passes only when somebody sleeps or works."""

    def __init__(self) -> None:
        self.time = 100.0

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock():
    return Clock()


def make(clock: Clock, hz: float = 20.0) -> Rate:
    return Rate(hz, clock=clock)


def test_ticks_are_due_at_absolute_times(clock):
    """Work inside a period moves no deadline."""
    rate, starts = make(clock), []
    for work in (0.0, 0.03, 0.049, 0.0, 0.02):
        rate.wait()
        starts.append(clock.time)
        clock.time += work
    assert starts == pytest.approx([100.0, 100.05, 100.1, 100.15, 100.2])
    assert rate.skipped == 0


def test_a_late_tick_does_not_move_the_next(clock):
    rate = make(clock)
    rate.wait()
    clock.time += 0.07  # into the second period, but not through it
    assert rate.wait() == 1 and clock.time == pytest.approx(100.07)
    rate.sent()
    assert rate.wait() == 2 and clock.time == pytest.approx(100.1)
    assert list(rate.lateness) == [pytest.approx(0.02)]
    assert rate.missed == 0


def test_ticks_that_are_slept_through_are_skipped_and_counted(clock):
    rate = make(clock)
    rate.wait()
    rate.sent()
    clock.time += 0.22  # ticks 1, 2 and 3 pass; 4 is due, a little late
    assert rate.wait() == 4
    rate.sent()
    assert list(rate.lateness) == [0.0, pytest.approx(0.02)]
    assert rate.skipped == rate.missed == 3


def test_a_command_sent_after_the_next_tick_was_due_is_a_miss(clock):
    rate = make(clock)
    rate.wait()
    clock.time += 0.06
    rate.sent()
    assert rate.missed == 1
