"""Between policy and robot: whatever is asked, what goes out is safe, and why it was changed is counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.config import SafetyConfig
from vla.control.safety import SafetyFilter
from vla.errors import ConfigError
from vla.spec import RobotSpec

SPEC = RobotSpec(
    cameras=("front",), state_names=(), action_names=("x", "y", "grip"), gripper_index=2, hold=(0, 0, None)
)
LOW, HIGH = np.array([-1.0, -1.0, 0.0]), np.array([1.0, 1.0, 1.0])


def make(**values) -> SafetyFilter:
    return SafetyFilter(SPEC, SafetyConfig(**values), LOW, HIGH)


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_nothing_but_finite_commands_in_range_without_jumps_goes_out(wanted):
    safety, last = make(max_change=0.1), None
    for action in wanted:
        command = safety.check(np.array(action, np.float32), age_s=0.0)
        assert np.isfinite(command).all() and (command >= LOW).all() and (command <= HIGH).all()
        held = not np.isfinite(action).all()
        if held:
            np.testing.assert_array_equal(command, SPEC.hold_action(last))
        elif last is not None:
            assert (np.abs(command - last)[:2] <= 0.2 + 1e-6).all()
        last = command


def test_every_intervention_is_counted_with_its_reason():
    safety, fine = make(max_entropy=1.0), np.array([0.5, -0.5, 1.0], np.float32)
    np.testing.assert_array_equal(safety.check(fine, 0.0), fine)
    assert not safety.interventions
    hold = np.array([0, 0, 1.0])  # the arm stays, the gripper keeps what it has
    for action, age, entropy, reason in (
        (None, 0.0, 0.0, "underrun"),
        (fine, 0.6, 0.0, "stale observation"),
        (np.array([np.nan, 0, 0]), 0.0, 0.0, "not finite"),
        (fine[:2], 0.0, 0.0, "not finite"),
        (fine, 0.0, 1.5, "not confident"),
    ):
        before = safety.interventions[reason]
        np.testing.assert_array_equal(safety.check(action, age, entropy), hold)
        assert safety.interventions[reason] == before + 1
    np.testing.assert_array_equal(safety.check(np.array([3.0, 0, 1.0]), 0.0), [1.0, 0, 1.0])
    assert safety.interventions["range"] == 1


def test_an_emergency_stop_stays_until_it_is_released():
    safety, fine = make(), np.array([0.5, -0.5, 1.0], np.float32)
    safety.check(fine, 0.0)
    safety.emergency_stop()
    for _ in range(3):
        np.testing.assert_array_equal(safety.check(fine, 0.0), [0, 0, 1.0])
    assert safety.interventions["emergency stop"] == 3
    safety.reset()
    np.testing.assert_array_equal(safety.check(fine, 0.0), fine)


def test_grippers_may_jump():
    safety = make(max_change=0.1)
    safety.check(np.array([0, 0, 0.0]), 0.0)
    np.testing.assert_allclose(safety.check(np.array([1.0, 0, 1.0]), 0.0), [0.2, 0, 1.0])
    assert safety.interventions["jump"] == 1


def test_limits_must_fit_the_robot():
    with pytest.raises(ConfigError, match="x, y, grip"):
        SafetyFilter(SPEC, SafetyConfig(), LOW[:2], HIGH[:2])
