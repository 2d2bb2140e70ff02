"""The robot arm: six joints, a parallel gripper and a wrist camera, built from primitive geoms with `mujoco.MjSpec`.

Owns the kinematics, the actuators and the names of all parts of the robot. Does not know the table, the tasks or the
conversion of Cartesian actions to joint targets (see `ik.py` and `world.py`).

If all joints are zero, all body frames are parallel to the world frame. If the hand's roll, pitch and yaw are zero, it
points straight down. In this pose, the wrist axes (pitch, roll, yaw) are orthogonal and intersect in one point, so the
arm is far from singularities in its whole workspace. Fingers open along the hand's y axis.
"""

from __future__ import annotations

import math

import mujoco
import numpy as np

JOINTS: tuple[str, ...] = ("base_yaw", "shoulder", "elbow", "wrist_pitch", "wrist_roll", "wrist_yaw")
FINGERS: tuple[str, ...] = ("finger_left", "finger_right")
FINGER_TRAVEL = 0.045  # metres per finger; the open gripper has a gap of 9 cm
TCP = "tcp"
ELBOW_UP = np.array([0.0, -1.2, 1.9, -0.7, 0.0, 0.0])  # radians; initial guess of `ArmIK` that selects its branch

_SHOULDER_HEIGHT, _UPPER_ARM, _FOREARM = 0.28, 0.38, 0.36
_WRIST_TO_TCP = 0.175
# Collision bits: static furniture, objects, robot. Robot parts never collide with each other.
STATIC_BITS, OBJECT_BITS, ROBOT_BITS = (4, 3), (1, 7), (2, 5)

_WHITE, _GREY, _DARK = (0.93, 0.93, 0.93, 1), (0.55, 0.57, 0.60, 1), (0.16, 0.17, 0.19, 1)
_KP, _KV = 9000.0, 160.0  # N m/rad, N m s/rad; with an armature of 0.5 the arm settles within one control step
KV_OVER_KP = _KV / _KP


def add_arm(spec: mujoco.MjSpec) -> None:
    """Add the arm at the world origin. Call this first, because its joints must be qpos[0:8]."""
    box, capsule, cylinder = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER

    def visual(body, kind, **kwargs) -> None:
        body.add_geom(type=kind, contype=0, conaffinity=0, density=300, **kwargs)

    def link(parent, joint: str, pos, axis, limits):
        body = parent.add_body(name=joint, pos=pos, gravcomp=1)
        body.add_joint(
            name=joint, type=mujoco.mjtJoint.mjJNT_HINGE, axis=axis, armature=0.5, limited=True, range=limits
        )
        return body

    x_axis, y_axis, z_axis = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    world = spec.worldbody
    visual(world, cylinder, pos=(0, 0, 0.11), size=(0.06, 0.11, 0), rgba=_DARK)
    turret = link(world, "base_yaw", (0, 0, _SHOULDER_HEIGHT), z_axis, (-2.6, 2.6))
    visual(turret, capsule, fromto=(0, -0.05, 0, 0, 0.05, 0), size=(0.05, 0, 0), rgba=_GREY)
    upper = link(turret, "shoulder", (0, 0, 0), y_axis, (-2.6, 0.6))
    visual(upper, capsule, fromto=(0, 0, 0, _UPPER_ARM, 0, 0), size=(0.038, 0, 0), rgba=_WHITE)
    fore = link(upper, "elbow", (_UPPER_ARM, 0, 0), y_axis, (0.02, 2.9))
    visual(fore, capsule, fromto=(0, -0.03, 0, 0, 0.03, 0), size=(0.042, 0, 0), rgba=_GREY)
    visual(fore, capsule, fromto=(0, 0, 0, _FOREARM - 0.03, 0, 0), size=(0.028, 0, 0), rgba=_WHITE)
    pitch = link(fore, "wrist_pitch", (_FOREARM, 0, 0), y_axis, (-2.9, 2.9))
    visual(pitch, capsule, fromto=(0, -0.02, 0, 0, 0.02, 0), size=(0.03, 0, 0), rgba=_GREY)
    roll = link(pitch, "wrist_roll", (0, 0, 0), x_axis, (-1.5, 1.5))
    visual(roll, capsule, fromto=(-0.01, 0, 0, 0.01, 0, 0), size=(0.026, 0, 0), rgba=_GREY)
    hand = link(roll, "wrist_yaw", (0, 0, 0), z_axis, (-2.9, 2.9))
    visual(hand, cylinder, fromto=(0, 0, -0.02, 0, 0, -0.085), size=(0.024, 0, 0), rgba=_GREY)
    contype, conaffinity = ROBOT_BITS
    hand.add_geom(
        type=box, name="palm", pos=(0, 0, -0.098), size=(0.020, 0.060, 0.013), rgba=_DARK, density=300,
        contype=contype, conaffinity=conaffinity,
    )  # fmt: skip
    hand.add_site(name=TCP, pos=(0, 0, -_WRIST_TO_TCP), size=(0.004, 0, 0), group=5)
    # In front of the hand. The camera looks back and down at the fingertips, a grasped object and the table.
    hand.add_camera(name="wrist", pos=(0.09, 0, 0.02), fovy=70, quat=_looking_down(math.radians(16.0)))
    for name, side in zip(FINGERS, (1, -1), strict=True):
        finger = hand.add_body(name=name, pos=(0, side * 0.007, -_WRIST_TO_TCP + 0.020), gravcomp=1)
        finger.add_joint(
            name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, side, 0), armature=0.1, damping=2.0,
            limited=True, range=(0, FINGER_TRAVEL),
        )  # fmt: skip
        finger.add_geom(
            type=box, name=name, size=(0.014, 0.006, 0.032), rgba=_DARK, density=500, condim=4,
            friction=(1.6, 0.02, 0.001), contype=contype, conaffinity=conaffinity, solimp=(0.95, 0.99, 0.001, 0.5, 2),
            solref=(0.01, 1),
        )  # fmt: skip
    _add_actuators(spec)


def _looking_down(tilt: float) -> np.ndarray:
    """Quaternion of a camera that looks down, tilted by `tilt` radians towards -x. Image right is +y."""
    quat, turn, lean = np.empty(4), np.empty(4), np.empty(4)
    mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0.0, 1.0]), math.pi / 2)
    mujoco.mju_axisAngle2Quat(lean, np.array([1.0, 0.0, 0.0]), tilt)
    mujoco.mju_mulQuat(quat, turn, lean)
    return quat


def _add_actuators(spec: mujoco.MjSpec) -> None:
    def servo(name: str, target: str, kind: mujoco.mjtTrn, kp: float, kv: float, force: float, limits) -> None:
        gain, bias = np.zeros(mujoco.mjNGAIN), np.zeros(mujoco.mjNBIAS)
        gain[0], bias[1], bias[2] = kp, -kp, -kv
        spec.add_actuator(
            name=name, target=target, trntype=kind, gaintype=mujoco.mjtGain.mjGAIN_FIXED, gainprm=gain,
            biastype=mujoco.mjtBias.mjBIAS_AFFINE, biasprm=bias, forcelimited=True, forcerange=(-force, force),
            ctrllimited=True, ctrlrange=limits,
        )  # fmt: skip

    for joint in JOINTS:
        servo(joint, joint, mujoco.mjtTrn.mjTRN_JOINT, _KP, _KV, 400.0, (-4, 4))
    # One motor drives both fingers. The equality constraint that keeps them symmetric is soft: the closing gripper
    # centres a free object, but both fingers still grasp a fixed one (a handle) if the hand is slightly off-centre.
    tendon = spec.add_tendon(name="grip")
    for finger in FINGERS:
        tendon.wrap_joint(finger, 0.5)
    symmetric = np.zeros(mujoco.mjNEQDATA)
    symmetric[1] = 1.0
    spec.add_equality(
        type=mujoco.mjtEq.mjEQ_JOINT, objtype=mujoco.mjtObj.mjOBJ_JOINT, name1=FINGERS[0], name2=FINGERS[1],
        data=symmetric, solref=(0.04, 1),
    )  # fmt: skip
    servo("grip", "grip", mujoco.mjtTrn.mjTRN_TENDON, 1500.0, 90.0, 35.0, (0, FINGER_TRAVEL))
