"""Questions about Meta-World's scenes: answers by the expert, topics, and no privileged input."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.metaworld import MUJOCO
from envs.metaworld_questions import CENTER, QUESTION_IDS, REACH


def make(task, **kwargs):
    pytest.importorskip("metaworld")
    if mujoco.__version__ != MUJOCO:
        pytest.skip(f"Meta-World needs mujoco=={MUJOCO}, this is {mujoco.__version__}")
    return gym.make(f"vla-metaworld-where/{task}-v3", **{"cameras": (), "start_steps": 20, **kwargs})


def test_every_task_has_questions():
    assert len(QUESTION_IDS) == 50 and all(env_id in gym.registry for env_id in QUESTION_IDS)


@pytest.mark.parametrize("task", ["reach", "peg-insert-side", "button-press-topdown"])
def test_the_expert_knows_the_position_and_another_answer_is_wrong(task):
    env, topics = make(task), set()
    for seed in range(12):
        observation, info = env.reset(seed=seed)
        topic = info["instruction"].split()[3]
        topics.add(topic)
        world = env.unwrapped._inner
        place = {"hand": world.get_endeff_pos(), "object": world._get_obs()[4:7], "goal": world._target_pos}[topic]
        answer = env.unwrapped.make_expert().act()
        np.testing.assert_allclose(CENTER + REACH * answer[:3], place, atol=1e-4)
        if topic == "hand":
            np.testing.assert_allclose(observation["agent_pos"][:3], place, atol=1e-4)
        _, reward, terminated, _, info = env.step(answer)
        assert terminated and info["is_success"] and reward == 1
        env.reset(seed=seed)
        _, _, terminated, truncated, info = env.step(answer + np.float32([0.1, 0, 0, 0]))
        assert truncated and not terminated and not info["is_success"]
    assert topics == {"hand", "object", "goal"}


def test_a_question_depends_on_the_seed_only_and_shows_what_the_task_shows():
    env, task = make("push", cameras=("corner2",)), gym.make("vla-metaworld/push-v3", start_steps=20)
    first, info = env.reset(seed=3)
    env.reset(seed=4)
    again, info_again = env.reset(seed=3)
    assert info == info_again and first.keys() == {"pixels", "agent_pos"}
    shown, _ = task.reset(seed=3)
    for observation in (again, shown):
        np.testing.assert_array_equal(observation["pixels"]["corner2"], first["pixels"]["corner2"])
        np.testing.assert_array_equal(observation["agent_pos"], first["agent_pos"])


def test_check_env_is_clean(recwarn):
    check_env(make("reach").unwrapped, skip_render_check=True)
    assert not [w for w in recwarn if "envs" in str(w.filename)]


def test_topics():
    env = make("push", topics=["goal"])
    asked = {env.reset(seed=seed)[1]["instruction"].split()[3] for seed in range(8)}
    assert asked == {"goal"}
    with pytest.raises(ValueError, match=r"topics.*Did you mean 'goal'"):
        make("push", topics=["goals"])
    with pytest.raises(ValueError, match="topics"):
        make("push", topics=[])
