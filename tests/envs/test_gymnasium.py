"""The environments follow Gymnasium's API and the conventions of this suite."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs

MADE = {"Reach", "Push", "PickUp", "PickPlace", "Stack", "PressButton", "OpenDrawer", "CloseDrawer"}


def test_every_task_is_registered() -> None:
    assert set(envs.ENV_IDS) == {f"vla/{name}-v0" for name in MADE}
    for env_id in envs.ENV_IDS:
        assert gym.spec(env_id).max_episode_steps


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_check_env(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(f"envs:{env_id}", render_mode="rgb_array", disable_env_checker=True)
        check_env(env.unwrapped)
        assert env.unwrapped.render().shape == (384, 384, 3)
        env.close()


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_observation_info_and_attributes(env_id: str) -> None:
    env = gym.make(env_id)
    observation, info = env.reset(seed=0)
    assert set(observation) == {"pixels", "agent_pos"}
    for image in observation["pixels"].values():
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and image.std() > 5
    assert observation["agent_pos"].shape == (7,) and observation["agent_pos"].dtype == np.float32
    assert info["instruction"] == env.get_wrapper_attr("task_description") and info["is_success"] is False
    assert info["reached"] == -1
    assert env.get_wrapper_attr("target_candidates") >= 2
    _, reward, terminated, truncated, info = env.step(np.zeros(7, dtype=np.float32))
    assert (reward, terminated, truncated, info["is_success"]) == (0.0, False, False, False)
    assert info["instruction"] == env.get_wrapper_attr("task_description")
    env.close()


def test_robot_has_the_properties_that_policies_need() -> None:
    env = gym.make("vla/Reach-v0", cameras=("front",))
    robot = env.unwrapped.robot
    assert robot["cameras"] == ["front"] and len(robot["state_names"]) == len(robot["action_names"]) == 7
    assert robot["hold"][robot["gripper_index"]] is None and robot["control_hz"] == 20.0
    assert robot["gripper_open"] == 1.0 and robot["gripper_closed"] == -1.0


def test_only_the_time_limit_truncates() -> None:
    env = gym.make("vla/Reach-v0", cameras=(), max_episode_steps=3)
    env.reset(seed=0)
    ends = [env.step(np.zeros(7))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_camera_choice_and_size() -> None:
    env = gym.make("vla/PickUp-v0", cameras=["wrist"], image_size=64)
    observation, _ = env.reset(seed=0)
    assert {name: image.shape for name, image in observation["pixels"].items()} == {"wrist": (64, 64, 3)}
    env.close()


@pytest.mark.parametrize("name", ["Point", "PointZone", "PointButton", "PointDrawer"])
def test_the_answer_to_a_question_is_the_position_of_the_target(name: str) -> None:
    env = gym.make(f"vla/{name}-v0")
    wrong = 0
    for seed in range(3):
        for target in range(env.get_wrapper_attr("target_candidates")):
            env.reset(seed=seed, options={"target": target})
            answer = env.unwrapped.make_expert().act()
            _, _, _, _, info = env.step(answer)
            assert info["is_success"] and info["reached"] == target
            env.reset(seed=seed, options={"target": (target + 1) % env.get_wrapper_attr("target_candidates")})
            wrong += not env.step(answer)[4]["is_success"]
    assert wrong >= 6
    env.close()
