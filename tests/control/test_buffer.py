"""The action queue of the control loop: overlapping, late and missing chunks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.control.buffer import ChunkBuffer


def chunk(value: float, length: int = 4) -> np.ndarray:
    """Entry 0 is value + position; entry 1, a gripper, is the sign of the value."""
    return np.stack([value + np.arange(length), np.full(length, np.sign(value))], axis=1).astype(np.float32)


def test_the_newest_chunk_is_used_and_an_empty_queue_is_an_underrun():
    buffer = ChunkBuffer("switch")
    assert buffer.at(0) is None
    buffer.put(chunk(10), first=0, now=0)
    assert buffer.at(1)[0] == 11 and buffer.ahead(1) == 3
    buffer.put(chunk(20), first=2, now=2)
    assert buffer.at(2)[0] == 20 and buffer.at(5)[0] == 23
    assert buffer.at(6) is None and buffer.ahead(6) <= 0


def test_late_actions_are_dropped_and_counted():
    buffer = ChunkBuffer("switch")
    buffer.put(chunk(10), first=3, now=5)
    assert buffer.late == 2 and buffer.at(5)[0] == 12
    buffer.put(chunk(20), first=0, now=9)
    assert buffer.late == 6 and buffer.at(9) is None


def test_an_incomplete_chunk_is_completed_by_the_previous_one():
    buffer = ChunkBuffer("switch")
    buffer.put(chunk(10), first=0, now=0)
    buffer.put(chunk(20)[:1], first=2, now=2, more=True)
    assert [buffer.at(tick)[0] for tick in (2, 3)] == [20, 13] and buffer.at(4) is None and buffer.ahead(2) == 2
    buffer.put(chunk(20)[:2], first=2, now=3, more=True)
    assert buffer.at(3)[0] == 21 and buffer.late == 0
    buffer.put(chunk(20), first=2, now=3)
    assert [buffer.at(tick)[0] for tick in (3, 4, 5)] == [21, 22, 23] and buffer.late == 0
    buffer.put(chunk(30)[:3], first=6, now=8, more=True)
    assert buffer.late == 2


def test_an_aborted_chunk_is_not_mixed_with_the_next():
    buffer = ChunkBuffer("ensemble")
    buffer.put(chunk(10)[:2], first=0, now=0, more=True)
    buffer.complete()
    buffer.put(chunk(20), first=1, now=1)
    assert 11 < buffer.at(1)[0] < 20 and buffer.at(2)[0] == 21


def test_ensembling_averages_overlapping_actions_except_the_gripper():
    buffer = ChunkBuffer("ensemble", gripper=1)
    buffer.put(chunk(10), first=0, now=0)
    buffer.put(chunk(-20), first=2, now=2)
    old, new = 12.0, -20.0
    weight = np.exp(-0.01)
    assert buffer.at(2)[0] == pytest.approx((old + weight * new) / (1 + weight))
    assert buffer.at(2)[1] == -1.0
    assert buffer.at(4)[0] == -18.0  # only the new chunk contains this step


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=8),
    st.sampled_from(["switch", "ensemble", "prefix"]),
)
def test_an_action_always_belongs_to_its_step(chunks, transition):
    buffer, spoken = ChunkBuffer(transition), {}
    for number, (first, delay) in enumerate(sorted(chunks)):
        actions = np.full((4, 1), float(number), np.float32)
        buffer.put(actions, first, first + delay)
        for tick in range(first, first + 4):
            spoken.setdefault(tick, []).append(number)
        now = first + delay
        action = buffer.at(now)
        if action is None:
            assert transition != "ensemble" or now not in spoken
        else:
            assert min(spoken[now]) - 1e-5 <= action[0] <= max(spoken[now]) + 1e-5


def test_chunks_for_different_tasks_are_not_averaged():
    buffer = ChunkBuffer("ensemble")
    buffer.put(chunk(10), first=0, now=0)
    buffer.put(chunk(12), first=1, now=1)
    buffer.new_task()
    assert 12 < buffer.at(2)[0] < 13  # the new chunk does not contain this step yet
    buffer.put(chunk(-40)[:1], first=2, now=2, more=True)
    assert buffer.at(2)[0] == -40 and 13 < buffer.at(3)[0] < 14
    buffer.put(chunk(-40), first=2, now=3)
    buffer.put(chunk(-60), first=4, now=4)
    assert -60 < buffer.at(4)[0] < -38
