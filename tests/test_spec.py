"""Action spaces, and the check that a policy fits a robot."""

import copy
import dataclasses
import json

import msgpack
import numpy as np
import pytest

from vla.errors import SpecError
from vla.spec import ActionSpace, RobotSpec

ARM = RobotSpec(
    cameras=("front", "wrist"),
    state_names=("x", "y", "grip"),
    action_names=("dx", "dy", "grip"),
    action_space="ee_delta",
    gripper_index=2,
    control_hz=10.0,
)


def changed(**values) -> RobotSpec:
    return dataclasses.replace(ARM, **values)


RELATIVE = {"joint_delta", "joint_velocity", "ee_delta", "ee_velocity"}


def test_whether_action_spaces_are_relative():
    assert {str(space) for space in ActionSpace if space.relative} == RELATIVE
    assert {str(space) for space in ActionSpace} - RELATIVE == {"joint_position", "ee_position", "unspecified"}


@pytest.mark.parametrize(
    ("spelt", "member"),
    [
        ("delta_ee", "ee_delta"),
        ("ee_delta_pose", "ee_delta"),
        ("eef_delta", "ee_delta"),
        ("relative_joint_position", "joint_delta"),
        ("delta_joint", "joint_delta"),
        ("joint_vel", "joint_velocity"),
        ("twist", "ee_velocity"),
        ("ee_pose", "ee_position"),
    ],
)
def test_other_spellings_are_read(spelt, member):
    spec = changed(action_space=spelt)
    assert spec.action_space is ActionSpace(member) and spec.to_dict()["action_space"] == member
    held = [0, 0, 1] if member in RELATIVE else [0.5, -0.25, 1]
    np.testing.assert_array_equal(spec.hold_action(np.array([0.5, -0.25, 1.0])), held)


@pytest.mark.parametrize(
    ("spelt", "near"),
    [
        ("ee_deltas", "ee_delta"),
        ("joint_positon", "joint_position"),
        ("delta", ""),
        ("eef_pos", ""),
        ("EE_DELTA", ""),
        (3, ""),
        (None, ""),
    ],
)
def test_unknown_action_spaces_are_rejected_with_the_valid_ones(spelt, near):
    with pytest.raises(SpecError, match=f"unknown action space '{spelt}'.*{near}.*Valid: 'joint_position'.*`hold`"):
        changed(action_space=spelt)


def test_a_space_is_its_name_in_every_file():
    for read in (json.loads(json.dumps(ARM.to_dict())), msgpack.unpackb(msgpack.packb(ARM.to_dict()))):
        assert read["action_space"] == "ee_delta" and RobotSpec.from_dict(read) == ARM
    assert copy.deepcopy(ARM) == ARM and type(ARM.to_dict()["action_space"]) is str


def test_a_robot_fits_itself_and_one_with_fewer_properties():
    ARM.check_fits(ARM)
    ARM.check_fits(changed(cameras=("top", "wrist", "front"), control_hz=10.01))
    ARM.check_fits(changed(action_space="unspecified", gripper_index=None))
    ARM.check_fits(changed(gripper_index=-1))  # -1 is the last entry, the gripper
    changed(state_names=()).check_fits(ARM)  # a policy without state input


@pytest.mark.parametrize(
    ("robot", "message"),
    [
        ({"cameras": ("wrist",)}, r"needs camera 'front', the arm has 'wrist'. Map it in the adapter's .*front: <path"),
        ({"action_names": ("dx", "grip")}, r"action has 3 entries \(dx, dy, grip\), the arm has 2 \(dx, grip\)"),
        ({"state_names": ()}, r"state has 3 entries .* the arm has 0"),
        ({"action_names": ("dy", "dx", "grip")}, "The order differs"),
        ({"state_names": ("grip", "x", "y")}, "The order differs"),
        ({"action_names": ("a", "b", "grip")}, "The names differ"),
        ({"state_names": ("x", "y", "force")}, "The names differ"),
        ({"action_space": "ee_velocity"}, "actions are ee_delta, those of the arm are ee_velocity"),
        ({"gripper_open": -1.0, "gripper_closed": 1.0}, "gripper with 1 and closes it with -1, the arm with -1 and 1"),
        ({"gripper_closed": 0.0}, "the arm with 1 and 0"),
        ({"gripper_index": 1}, "gripper is action entry 2, the arm's is entry 1"),
        ({"control_hz": 20.0}, r"runs at 10 actions per second, the arm at 20.*`vla deploy --hz 10`"),
    ],
)  # fmt: skip
def test_mismatches_are_rejected(robot, message):
    with pytest.raises(SpecError, match=message):
        ARM.check_fits(changed(**{"gripper_index": None} | robot if "action_names" in robot else robot), "the arm")


def test_only_other_names_and_rates_can_be_tolerated():
    other = changed(action_names=("a", "b", "c"), control_hz=20.0)
    with pytest.warns(UserWarning, match="names differ"), pytest.warns(UserWarning, match="runs at 10"):
        ARM.check_fits(other, tolerated=("names", "rate"))
    with pytest.raises(SpecError, match="order"):
        ARM.check_fits(changed(action_names=("dy", "dx", "grip")), tolerated=("names", "rate"))


@pytest.mark.parametrize(
    "change", [{"control_hz": np.inf}, {"control_hz": 0}, {"hold": (0, np.nan, 0)}, {"hold": (0,)}]
)
def test_invalid_robots_are_rejected(change):
    with pytest.raises(SpecError, match=next(iter(change))):
        changed(**change)
