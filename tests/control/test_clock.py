"""The control rate, with a clock that the test controls."""

import pytest

from vla.control.clock import Rate


class Clock:
    """A clock that advances only in `sleep` and when the test sets it."""

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
    """Work within a period does not move the deadlines."""
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
    clock.time += 0.07  # within the second period
    assert rate.wait() == 1 and clock.time == pytest.approx(100.07)
    rate.sent()
    assert rate.wait() == 2 and clock.time == pytest.approx(100.1)
    assert list(rate.lateness) == [pytest.approx(0.02)]
    assert rate.missed == 0


def test_missed_ticks_are_skipped_and_counted(clock):
    rate = make(clock)
    rate.wait()
    rate.sent()
    clock.time += 0.22  # ticks 1, 2 and 3 pass; 4 is slightly late
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
