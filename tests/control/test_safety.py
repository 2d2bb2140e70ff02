"""The safety filter: all commands are safe, and interventions are counted by reason."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.config import SafetyConfig
from vla.control.safety import SafetyFilter
from vla.errors import ConfigError
from vla.spec import ActionSpace, RobotSpec

SPEC = RobotSpec(
    cameras=("front",),
    state_names=("px", "py"),
    action_names=("x", "y", "grip"),
    action_space="ee_delta",
    gripper_index=2,
    hold=(0, 0, None),
    control_hz=10.0,
)
LOW, HIGH = np.array([-1.0, -1.0, 0.0]), np.array([1.0, 1.0, 1.0])


def make(delta: bool = True, **values) -> SafetyFilter:
    """A filter for a robot with deltas, which holds with 0, or with positions, which holds by repeating the last
    one."""
    spec = SPEC if delta else dataclasses.replace(SPEC, action_space="ee_position", hold=())
    return SafetyFilter(spec, SafetyConfig(**values), LOW, HIGH)


def told(command, *expected) -> None:
    np.testing.assert_allclose(command.action, expected, atol=1e-6)


@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=6), st.booleans())
def test_commands_are_finite_in_range_and_without_jumps(wanted, delta):
    safety, last = make(delta, max_change=0.1, max_velocity={"x": 3.0}, max_acceleration={"y": 40.0}), None
    motion, before = np.zeros(3), np.zeros(3)
    for action in wanted:
        command = safety.check(np.array(action, np.float32)).action
        assert np.isfinite(command).all() and (command >= LOW).all() and (command <= HIGH).all()
        if not np.isfinite(action).all():
            np.testing.assert_array_equal(command, make(delta)._spec.hold_action(last))
        else:
            motion = command if delta else command - (command if last is None else last)
            assert last is None or (np.abs(command - last)[:2] <= 0.2 + 1e-6).all()
            assert abs(motion[0]) <= 3.0 / 10 + 1e-6 and abs(motion[1] - before[1]) <= 40.0 / 100 + 1e-6
        before = command if delta else command - (command if last is None else last)
        last = command


def test_every_intervention_is_counted_with_its_reason():
    safety, fine = make(max_entropy=1.0), np.array([0.5, -0.5, 1.0], np.float32)
    told(safety.check(fine), *fine)
    assert not safety.interventions
    for action, fault, entropy, reason in (
        (None, None, 0.0, "underrun"),
        (fine, "dark camera", 0.0, "dark camera"),
        (np.array([np.nan, 0, 0]), None, 0.0, "not finite"),
        (fine[:2], None, 0.0, "not finite"),
        (fine, None, 1.5, "not confident"),
    ):
        before = safety.interventions[reason]
        command = safety.check(action, fault, entropy=entropy)
        told(command, 0, 0, 1.0)  # the arm stops, and the gripper repeats its last value
        assert command.reasons == (reason,) and safety.interventions[reason] == before + 1
    told(safety.check(np.array([3.0, 0, 1.0])), 1.0, 0, 1.0)
    assert safety.interventions["range"] == 1


def test_an_emergency_stop_stays_until_it_is_released():
    safety, fine = make(), np.array([0.5, -0.5, 1.0], np.float32)
    safety.check(fine)
    safety.emergency_stop()
    for _ in range(3):
        told(safety.check(fine), 0, 0, 1.0)
    assert safety.interventions["emergency stop"] == 3
    safety.release()
    told(safety.check(fine), *fine)


def test_grippers_may_jump():
    safety = make(max_change=0.1)
    safety.check(np.array([0, 0, 0.0]))
    told(safety.check(np.array([1.0, 0, 1.0])), 0.2, 0, 1.0)
    assert safety.interventions["jump"] == 1


def test_velocity_and_acceleration_of_positions_and_of_deltas():
    """At 10 Hz, 2 per second are 0.2 per command, and 5 per second squared change this by 0.05."""
    limits = {"max_velocity": {"x": 2.0}, "max_acceleration": {"y": 5.0}}
    safety = make(delta=False, **limits)
    told(safety.check(np.zeros(3)), 0, 0, 0)
    command = safety.check(np.array([1.0, 1.0, 0]))
    told(command, 0.2, 0.05, 0)
    assert command.reasons == ("velocity", "acceleration")
    told(safety.check(np.array([1.0, 1.0, 0])), 0.4, 0.15, 0)
    safety = make(delta=True, **limits)
    told(safety.check(np.array([1.0, 1.0, 0])), 0.2, 0.05, 0)
    told(safety.check(np.array([1.0, 1.0, 0])), 0.2, 0.10, 0)
    told(safety.check(None), 0, 0, 0)
    told(safety.check(np.array([0.1, 1.0, 0])), 0.1, 0.05, 0)  # from standstill again


def test_the_hand_does_not_leave_the_workspace():
    box = {"workspace": {"x": ("px", -0.5, 0.5)}}
    deltas, places = make(delta=True, **box), make(delta=False, **box)
    outward, inward = np.array([0.3, 0.3, 1.0]), np.array([-0.3, 0.3, 1.0])
    told(deltas.check(outward, state=np.array([0.4, 0.0])), *outward)
    at_the_wall = deltas.check(outward, state=np.array([0.5, 0.0]))
    told(at_the_wall, 0, 0.3, 1.0)
    assert at_the_wall.reasons == ("workspace",)
    told(deltas.check(inward, state=np.array([0.6, 0.0])), *inward)
    told(places.check(np.array([0.9, 0.9, 1.0]), state=np.array([0.0, 0.0])), 0.5, 0.9, 1.0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_velocity": {"elbow": 1.0}}, "max_velocity: unknown action entry 'elbow'"),
        ({"max_acceleration": {"x": 0.0}}, "x must be positive, got 0"),
        ({"workspace": {"x": ("pz", 0.0, 1.0)}}, "unknown state entry 'pz'"),
        ({"workspace": {"x": ("px", 1.0, 1.0)}}, "x must have low < high"),
    ],
)
def test_limits_must_match_the_robot(limits, message):
    with pytest.raises(ConfigError, match=message):
        make(**limits)


def test_a_run_begins_at_the_robots_position():
    """Holding and limits start from the measured positions; a gripper keeps its last command."""
    spec = RobotSpec(("front",), ("x", "y", "grip"), ("x", "y", "grip"), "joint_position", gripper_index=2)
    safety = SafetyFilter(spec, SafetyConfig(max_velocity={"x": 1.0}), LOW, HIGH)
    safety.begin(np.array([0.7, -0.3, 0.4]))
    told(safety.check(None), 0.7, -0.3, 0.4)
    told(safety.check(np.array([0.0, 0.0, 0.9])), 0.6, 0.0, 0.9)  # one per second at 10 Hz
    safety.begin(np.array([0.2, 0.1, 0.5]))  # the robot was moved by hand
    told(safety.check(None), 0.2, 0.1, 0.9)
    safety.forget()
    safety.begin(np.array([0.2, 0.1, 0.5]))
    told(safety.hold(), 0.2, 0.1, 0.5)
    deltas = make()
    deltas.begin(np.zeros(2))
    told(deltas.check(None), 0, 0, 1.0)  # open, before the first command
    deltas.check(np.array([0.5, 0.5, 0.0]))
    deltas.begin(np.zeros(2))
    told(deltas.check(None), 0, 0, 0)


def test_a_run_begins_at_the_robots_hold_reference():
    safety, deltas = make(delta=False), make()
    safety.begin(np.zeros(2), reference=np.array([0.7, -0.3, 0.4]))
    told(safety.check(None), 0.7, -0.3, 0.4)
    told(safety.check(np.array([0.5, 0.0, 1.0])), 0.5, 0.0, 1.0)
    told(safety.check(None), 0.5, 0.0, 1.0)  # from now on, the last command is used
    deltas.begin(reference=np.array([9.0, 9.0, 0.3]))
    told(deltas.check(None), 0.0, 0.0, 0.3)


@pytest.mark.parametrize("space", ["ee_delta", "joint_velocity"])
def test_hold_does_not_move_the_robot(space):
    """By default, deltas and velocities are 0, and a gripper repeats its last value."""
    spec = RobotSpec(("front",), (), ("x", "y", "grip"), space, gripper_index=2)
    safety = SafetyFilter(spec, SafetyConfig(), LOW, HIGH)
    safety.check(np.array([0.5, 0.5, 0.0]))
    safety.emergency_stop()
    told(safety.check(np.array([0.5, 0.5, 0.0])), 0, 0, 0)
    with pytest.raises(ConfigError, match="would keep it moving: y must be 0"):
        SafetyFilter(dataclasses.replace(spec, hold=(0, None, None)), SafetyConfig(), LOW, HIGH)


@given(
    st.sampled_from([space for space in ActionSpace if space is not ActionSpace.UNSPECIFIED]),
    st.sampled_from([None, 0, 1, 2]),
    st.lists(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_an_emergency_stop_never_moves_a_robot(space, gripper, wanted):
    """For every action space and all commands before and during the stop: relative entries are 0, others are
    constant."""
    spec = RobotSpec(("front",), (), ("x", "y", "grip"), space, gripper_index=gripper)
    safety, last = SafetyFilter(spec, SafetyConfig(), LOW, HIGH), None
    for action in wanted:
        last = safety.check(np.array(action, np.float32)).action
    safety.emergency_stop()
    expected = [0 if space.relative and entry != gripper else last[entry] for entry in range(3)]
    for action in [*wanted, None]:
        told(safety.check(None if action is None else np.array(action, np.float32)), *expected)
    told(safety.hold(), *expected)


@pytest.mark.parametrize("hold", [(0.5, 0, None), (0, None, 0), (-0.1, 0, 0)])
def test_a_hold_command_that_moves_is_rejected(hold):
    with pytest.raises(ConfigError, match="would keep it moving"):
        SafetyFilter(dataclasses.replace(SPEC, hold=hold), SafetyConfig(), LOW, HIGH)


def test_a_robot_without_a_hold_command_is_rejected():
    spec = RobotSpec(("front",), (), ("x", "y", "grip"))
    with pytest.raises(ConfigError, match="action_space"):
        SafetyFilter(spec, SafetyConfig(), LOW, HIGH)
    SafetyFilter(dataclasses.replace(spec, hold=(0, 0, None)), SafetyConfig(), LOW, HIGH)


def test_ranges_must_match_the_robot():
    with pytest.raises(ConfigError, match="x, y, grip"):
        SafetyFilter(SPEC, SafetyConfig(), LOW[:2], HIGH[:2])
