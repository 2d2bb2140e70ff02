"""The simulated arm: precise motion within its limits, and errors for invalid input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.ik import ArmIK, matrix_to_rpy, rpy_to_matrix
from envs.scene import HALF, HAND_BOX, OBJECT_BOX


@pytest.fixture(scope="module")
def env():
    made = gym.make("vla/PickUp-v0", cameras=()).unwrapped
    made.reset(seed=0)
    return made


ANGLES = st.tuples(*[st.floats(-0.5, 0.5)] * 3)
POINT = st.tuples(*[st.floats(0, 1)] * 3)


@settings(max_examples=30)
@given(POINT, st.just((0.0, 0.0, 0.0)) | ANGLES)
def test_inverse_kinematics_reaches_the_whole_box(point: tuple[float, ...], angles: tuple[float, ...]) -> None:
    """Upright in the whole workspace, and tilted at all positions of objects."""
    pos = HAND_BOX[0] + np.array(point) * (HAND_BOX[1] - HAND_BOX[0])
    if any(angles):
        pos[:2] = OBJECT_BOX[0] + np.array(point[:2]) * (OBJECT_BOX[1] - OBJECT_BOX[0])
    ik = ArmIK()
    start = np.array([np.arctan2(pos[1], pos[0]), -1.2, 1.9, -0.7, 0.0, -np.arctan2(pos[1], pos[0])])
    ik.solve(pos, np.array(angles), start, iterations=60)
    site = ik._site
    assert np.linalg.norm(ik._data.site_xpos[site] - pos) < 0.001
    assert np.allclose(ik._data.site_xmat[site].reshape(3, 3), rpy_to_matrix(np.array(angles)), atol=0.005)


@given(ANGLES)
def test_rpy_round_trip(angles: tuple[float, ...]) -> None:
    assert np.allclose(matrix_to_rpy(rpy_to_matrix(np.array(angles))), angles, atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [1.0, -0.4])
def test_a_step_is_2_5_cm_within_3_mm(env, axis: int, size: float) -> None:
    env.reset(seed=0)
    action = np.array([0, 0, 0, 0, 0, 0, 1.0])
    action[axis] = size
    goal = env.world.hand.copy()
    for _ in range(3):
        env.step(action)
        goal[axis] += 0.025 * size
        assert np.abs(env.world.hand - goal).max() < 0.003
    env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert np.abs(env.world.hand - goal).max() < 0.001 and np.abs(env.world.rpy).max() < 0.003


def test_rotation_follows_and_returns(env) -> None:
    env.reset(seed=0)
    start = env.world.hand.copy()
    for turn in (1, 1, 0):
        observation, *_ = env.step(np.array([0, 0, 0, 0.5 * turn, -0.5 * turn, turn, 1]))
    assert np.allclose(observation["agent_pos"][3:6], [0.15, -0.15, 0.3], atol=0.01)
    assert np.abs(env.world.hand - start).max() < 0.004


def test_the_commanded_pose_does_not_wind_up(env) -> None:
    env.reset(seed=0)
    for _ in range(60):
        env.step(np.array([1.0, 0, 0, 0, 0, 0, 1]))
    assert env.world.hand[0] == pytest.approx(HAND_BOX[1, 0], abs=0.003)
    for _ in range(20):
        env.step(np.array([0, 0, -1.0, 0, 0, 0, 1]))
    height = env.world.hand[2]
    env.step(np.array([0, 0, 1.0, 0, 0, 0, 1]))
    assert env.world.hand[2] > height + 0.015  # the hand moves back at once


def test_gripper_polarity(env) -> None:
    env.reset(seed=0)
    for command, opening in ((-1.0, 0.0), (1.0, 1.0), (-0.01, 0.0), (0.0, 1.0)):
        for _ in range(5):
            observation, *_ = env.step(np.array([0, 0, 0, 0, 0, 0, command]))
        assert observation["agent_pos"][6] == pytest.approx(opening, abs=0.05)


def test_objects_stay_where_they_are_put(env) -> None:
    for seed in range(4):
        env.reset(seed=seed)
        for _ in range(20):
            env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        for i, thing in enumerate(env.scene["objects"]):
            assert np.abs(env.world.object_pos(i)[:2] - thing["xy"]).max() < 0.001


def test_a_cylinder_stands_firmly_on_a_cube() -> None:
    """This needs several contacts per pair of geoms; MuJoCo's option for them has different names in different
    versions."""
    world = gym.make("vla/Stack-v0", cameras=()).unwrapped.world
    world.clear(np.array([0.35, 0.1, 0.2]))
    for i, shape in enumerate(("cube", "cylinder")):
        world.put_object(i, "red", shape, np.array([0.5, 0.0]), yaw=0.3)
    world.data.joint("object1").qpos[2] += 2 * HALF
    world.settle(50)
    pair = {world.model.geom("object0").id, world.model.geom("object1").id}
    assert sum(set(geoms) == pair for geoms in world.data.contact.geom.tolist()) >= 3
    assert world.object_speed(1) < 0.003


def test_the_light_is_directional() -> None:
    """MuJoCo's attribute for this has different names in different versions. A point light would shade images
    differently."""
    model = gym.make("vla/Reach-v0", cameras=()).unwrapped.world.model
    kind = model.light_type if hasattr(model, "light_type") else model.light_directional
    assert int(kind[0]) == 1  # mjLIGHT_DIRECTIONAL; True before 3.3.3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pairs": "trian"}, "pairs='trian'.*'train', 'heldout', 'all'.*Did you mean 'train'"),
        ({"phrasing": "new"}, "phrasing='new'.*'canonical'"),
        ({"cameras": ["top"]}, "cameras='top'.*'front', 'wrist'"),
        ({"objects": 7}, "objects=7.*from 2 to 4"),
        ({"image_size": 96.5}, "image_size=96.5.*integer"),
        ({"randomize": "yes"}, "randomize='yes'"),
    ],
)
def test_unknown_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("vla/Reach-v0", **kwargs)


def test_bad_options_and_actions_are_named(env) -> None:
    with pytest.raises(ValueError, match=r"target=3 .*from 0 to 2"):
        env.reset(seed=0, options={"target": 3})
    with pytest.raises(ValueError, match=r"option='goal'.*'target'"):
        env.reset(seed=0, options={"goal": 1})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(6,\).*7 numbers"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="dy=nan"):
        env.step(np.array([0, np.nan, 0, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="gripper=inf"):
        env.step(np.array([0, 0, 0, 0, 0, 0, np.inf]))


def test_step_before_reset_is_explained() -> None:
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        gym.make("vla/Reach-v0", cameras=()).unwrapped.step(np.zeros(7))


def test_missing_gl_is_explained() -> None:
    """Physics works without GL, and the first image raises an error that says what to install."""
    code = (
        "import gymnasium as gym, envs\n"
        "gym.make('vla/Reach-v0', cameras=()).reset(seed=0)\n"
        "try: gym.make('vla/Reach-v0').reset(seed=0)\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MUJOCO_GL": "off"}, capture_output=True, text=True
    )
    assert "apt-get install libegl1" in done.stdout and "MUJOCO_GL" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "failure",
    [
        "raise OSError('libmujoco.so.4.0.0: cannot open shared object file')",  # MuJoCo 3 over 4
        "import mujoco._specs",  # 4 over 3
    ],
)
def test_an_incomplete_mujoco_is_explained(failure: str, tmp_path: Path) -> None:
    """Not as missing GL: MuJoCo 3 and 4 share a folder, and pip replaces only a part of the files."""
    (tmp_path / "mujoco").mkdir()
    (tmp_path / "mujoco" / "__init__.py").write_text(failure)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", "import envs"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert "pip uninstall -y mujoco mujoco-core mujoco-studio" in last and "GL" not in last
