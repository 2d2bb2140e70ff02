"""The experts solve their tasks, also after noise and changes of the scene."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

import envs
from envs.check import main, rendering_rate, run_expert


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_clean_expert(env_id: str) -> None:
    report = run_expert(env_id, range(200, 206))
    assert report.successes == 6, report.row()
    assert max(report.lengths) < 60


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_noisy_expert_recovers(env_id: str) -> None:
    report = run_expert(env_id, range(300, 310), noise=1.0)
    assert report.successes >= 8, report.row()


@pytest.mark.parametrize("pairs", ["heldout", "all"])
def test_other_scenes(pairs: str) -> None:
    for env_id, objects in (("vla/Stack-v0", 4), ("vla/PickPlace-v0", 4), ("vla/Push-v0", 2)):
        assert run_expert(env_id, range(2), pairs=pairs, objects=objects).successes == 2


@pytest.mark.parametrize("env_id", envs.ENV_IDS)
def test_expert_is_a_function_of_the_state(env_id: str) -> None:
    env = gym.make(env_id, cameras=()).unwrapped
    env.reset(seed=1)
    noisy = env.make_expert(noise=1.0, seed=0)
    for _ in range(12):
        action = noisy.act()
        fresh = env.make_expert()
        assert np.array_equal(fresh.act(), noisy.label) and np.array_equal(fresh.label, fresh.act())
        assert action.dtype == np.float32 and np.abs(action).max() <= 1.0
        env.step(action)
        assert np.array_equal(env.make_expert().act()[3:6], np.zeros(3))  # an upright wrist is not rotated


def test_the_expert_picks_an_object_up_again() -> None:
    env = gym.make("vla/PickUp-v0", cameras=()).unwrapped
    env.reset(seed=4)
    expert = env.make_expert()
    for _ in range(16):
        env.step(expert.act())
    thing = env.scene["objects"][env.target]
    env.world.put_object(env.target, thing["color"], thing["shape"], np.array([0.40, -0.12]), 0.5)
    env.world.settle()
    assert any(env.step(expert.act())[2] for _ in range(50))


def test_either_of_two_identical_objects_may_be_picked() -> None:
    env = gym.make("vla/PickEither-v0", cameras=()).unwrapped
    first, second = (run_expert("vla/PickEither-v0", range(8), noise=noise) for noise in (0.0, 1.0))
    assert first.successes == 8 and second.successes >= 7
    for target in (0, 1):
        observation, info = env.reset(seed=3, options={"target": target})
        start, words = observation["agent_pos"][1], info["instruction"]
        expert, over = env.make_expert(), False
        while not over:
            observation, _, over, _, info = env.step(expert.act())
        assert info["is_success"] and info["reached"] == target
        assert abs(start) < 0.02 and (observation["agent_pos"][1] > 0.03) == (target == 0)
        env.scene["target"] = 1 - target  # the object in the hand is not put back
        assert env.step(env.make_expert().act())[4]["is_success"]
    left, right = env.scene["objects"]
    assert (left["color"], left["shape"]) == (right["color"], right["shape"])
    assert env.reset(seed=3, options={"target": 0})[1]["instruction"] == words


def test_noise_is_repeatable_and_checked() -> None:
    env = gym.make("vla/Reach-v0", cameras=()).unwrapped
    env.reset(seed=0)
    a, b = (
        np.array([expert.act() for _ in range(60)]) for expert in (env.make_expert(1.0, 3), env.make_expert(1.0, 3))
    )
    assert np.array_equal(a, b) and len(np.unique(a, axis=0)) > 1
    with pytest.raises(ValueError, match=r"noise=3\.0"):
        env.make_expert(noise=3.0)


def test_check_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["check", "--seeds", "2", "--env", "vla/Reach-v0", "--no-rendering"])
    main()
    assert "vla/Reach-v0" in capsys.readouterr().out
    assert rendering_rate("vla/Reach-v0", 20) > 0
